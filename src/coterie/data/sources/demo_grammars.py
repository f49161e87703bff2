"""The grammars of the made-up text of :mod:`coterie.data.sources.demo`, one for each job.

A grammar is lines ``symbol: alternative | alternative``; an indented line continues the one above, and ``{symbol}``
stands for one of the symbol's alternatives. ``labels`` lists the labels, ``message`` the forms of a message. A change
changes the rows that the demo's names stand for.
"""

from __future__ import annotations

CLINIC = """
labels: administrative | routine | urgent
message: {core}. | {core}. {close} | {hello} {core}. | {hello} {core}. {close} | {aside}. {core}.
  | {aside}, but {core}. | {core}. {aside}. | {hello} {aside}. {core}.
hello: Hello, | Good morning, | Dear team, | Hi, | Good evening, | To the practice:
close: Thank you. | Please tell me what to do. | You can reach me on the usual number. | Many thanks in advance.
  | I am at home all day. | Kind regards. | What do you advise? | Sorry to bother you.
urgent: {sudden} {patient} got a pain in the {spot} and {alarm} | {patient} {sank} {sudden} and {alarm}
  | since {trigger} {patient} {alarm} | the pain in my {spot} came {sudden} and by now I {alarm1}
  | {patient} took {drug} and now {alarm} | my {spot} swelled up {sudden} and I {alarm1} | {sudden} I {alarm1}
  | the cut on {kin}'s {limb} keeps bleeding however hard we press
  | {patient} has a fever that climbs by the hour and {alarm} | I took {drug} and now I {alarm1}
  | {patient} {alarm}, which never happened before | the {spot} of {kin} is crushed and there is blood everywhere
  | {sudden} the words of {kin} came out as nonsense | we found {kin} on the floor {sudden}, nobody knows since when
  | {kin} is expecting in {weeks} and has bled {sudden}
  | {sudden} hot oil went over {kin}'s {limb}, the skin hangs off
sudden: within minutes | half an hour ago | out of nowhere this morning | just now | during the night | all at once
  | an hour ago | at lunch today
weeks: two weeks | a month | ten days
alarm: can hardly speak | is gasping for air | does not answer when spoken to | looks grey and sweats
  | cannot keep even water down | has one arm hanging limp | keeps drifting off | is shaking all over
  | cannot be woken properly | talks nonsense | has blue lips | cannot move one leg | is vomiting blood
  | holds the {spot} and screams | does not know where we are
alarm1: can barely breathe | see everything double | cannot feel my left side | can no longer stand
  | keep blacking out | am drenched in cold sweat | cannot swallow | have my heart racing without pause
  | cannot see on one eye
sank: collapsed | fell to the floor | went stiff | turned pale and slumped over | lost consciousness for a moment
trigger: the bee sting | the fall from the ladder | the injection | supper | the new tablets | the bicycle accident
  | the wedding
drug: twice the dose | a whole strip of sleeping pills | someone else's tablets | a gulp from the wrong bottle
  | an unknown berry
routine: {patient} has had a little pain in the {spot} {long} and {calm} | my {spot} {bothers} {long}, {calm1}
  | I would like somebody to look at the {minor} on my {limb}, {calm1} | {patient} gets {cold} {often} but {calm}
  | it is time for {check} again, {calm1} | the tablets for my {spot} {dull}, could we try others
  | since {trigger} my {limb} {bothers}, {calm1} | could we talk about {topic} some time, {calm1}
  | {patient} is due for {check} | the {minor} on {kin}'s {limb} has not changed {long}
  | do you also help with {topic} | {kin} snores {often} and wonders about {topic}
  | does {patient} need {check} at that age | my {spot} {bothers} {often}, is there a cream for it
  | would {check} be of use, nobody in the family ever had one | {patient} has {cold} {often} and asks about {topic}
long: for some weeks | on and off since spring | for a year or so | since the holidays | for two months
  | these past months
often: every winter | now and then | in the evening | on Mondays | when the seasons change | after long days
calm: is otherwise well | plays and eats as ever | sleeps soundly | goes to work as usual | has no fever
  | does not mind it much | is cheerful
calm1: no worse than before | there is no hurry | it does not keep me from anything | any week will do
  | a rest makes it better | I manage well | only to be sure | whenever you have time
bothers: aches a bit | itches | feels stiff | is somewhat sore | clicks | tingles slightly | feels dry
minor: mole | dry patch | small lump | wart | scar | rash
cold: a runny nose | a mild cough | hay fever | light headaches | a dry throat
dull: make me a little tired | help less than they did | upset my stomach slightly | are too big to swallow
check: the yearly check of the heart | a blood pressure reading | the second vaccination | a blood test | the eye test
  | a look at the new tablets
topic: the diet for my heart | giving up smoking | poor sleep | travel vaccinations | the pain in my {limb}
  | losing weight
administrative: please send {paper} to {office} | I need {paper} for {office} {by} | {office} still waits for {paper}
  | could you move {visit} from {day} to {day} | the bill for {visit} {wrong} | I have {moved}, please change my file
  | {office} refuses to pay for {visit} and asks for {paper} | may {kin} collect {paper} for me {by}
  | do I have to pay for {visit} myself | I cannot come to {visit} on {day}, please give it to somebody else
  | which floor is {visit} on | {kin} has {moved}, whom do I tell
  | let me know whether the desk is open on {day} to hand in {paper}
paper: the report on my {spot} | a certificate of sickness | the letter about {trigger} | a copy of my blood test
  | proof of my vaccinations | the form on the accident | the X-ray of my {limb}
office: my insurance | my employer | the school | the specialist | the pension office | the court | the travel agency
visit: the visit for the pain in my {spot} | the emergency call at night | the check of my heart | the vaccination
  | the treatment of my {limb} | the appointment of {kin}
wrong: was sent twice | lists an injection that I never had | has a wrong date of birth | went to my old address
moved: a new address | another insurance now | a new telephone number | a new name since the wedding
  | left for another town
by: by {day} | before the end of the month | this week | as soon as possible | for the new year
day: Monday | Tuesday | Wednesday | Thursday | Friday | the third of May | the holiday
aside-urgent: last year {kin} {sank} at work and you helped at once
  | after {trigger} I could barely breathe, that is long over | {patient} is no longer gasping for air as in winter
  | the sudden pain in the {spot} last month never returned | it is not that somebody {sank}
  | nobody here is vomiting blood or has blue lips
aside-routine: the {minor} on my {limb} is a matter for another day | my {spot} {bothers} as always, never mind that
  | the yearly check can wait | there is the usual mild cough too | I am coming for a blood pressure reading anyway
  | about {topic} we can talk some other time
aside-administrative: I still owe you {paper} | the bill for {visit} is paid by now | you have my new address already
  | {office} got {paper}, thank you | we had an appointment on {day} | {paper} can wait
patient: my {family} | our {family} | the {family} of my friend
kin: my {family} | our {family}
family: son | daughter | mother | father | wife | husband | grandmother | uncle | baby | lodger
spot: chest | belly | head | back | throat | neck | stomach | ear
limb: knee | foot | hand | shoulder | elbow | ankle | hip | arm
"""

BANK = """
labels: account | card | loan | transfer
message: {core}. | {core}. {close} | {hello} {core}. | {hello} {core}. {close} | {aside}. {core}.
  | {aside}, but {core}. | {core}. {aside}. | {hello} {aside}, however {core}.
hello: Dear Sir or Madam, | Hello, | I have to complain: | To the manager: | Good day, | Once more:
close: Please mend this. | I expect an answer {when}. | This is the second time I write.
  | I am a customer of many years. | How can that be? | I want my money back. | I am thinking of leaving.
  | Please call me.
when: this week | by {day} | without delay | in writing
day: Monday | Tuesday | Wednesday | Thursday | Friday | the first of the month
card: {machine} swallowed it and nobody gave it back
  | somebody paid {sum} in {place} with a number that only I should know
  | the four digits you mailed me are refused at {machine} | the plastic {broke} and the new one has not come {since}
  | I was turned away at {checkout} although the monthly limit was not reached
  | paying without contact fails at {checkout} | you blocked it again while I was travelling in {place}
  | {sum} from {checkout} is on the bill twice | it was stolen in {place} and the hotline let me wait for {long}
  | the hotel in {place} keeps {sum} reserved on it | {machine} in {place} charged {sum} for taking out cash
  | the yearly price of the gold one rose to {sum}
machine: the cash machine | the ticket machine | your terminal in the hall | the machine at {place}
checkout: the petrol station | a restaurant | the supermarket till | an online shop | the pharmacy | the theatre
broke: snapped in two | lost its stripe | has expired | has a dead chip
account: the monthly charge for keeping my savings went up to {sum}
  | I asked you to close it {since} and it still exists
  | the yearly statement shows {sum} for paper that I never wanted | you pay no interest on my deposit {since}
  | {kin} cannot see our joint balance online {since} | the balance shown online is {sum} short
  | you ask me to prove my address again in order to keep it open
  | I cannot open one for {kin} without {long} of paperwork | the overdraft costs more than you told me
  | the login to see my savings is locked {since} | the name of {kin} is still on it after the divorce
  | you lowered the rate on the savings book without a word
loan: the instalment was taken twice {since} | the rate for the house was raised to more than the contract says
  | paying it all off early shall cost {sum} | you turned down the money for {thing} without a reason
  | after {long} I still wait for a decision on the money for {thing}
  | the remaining debt is {sum} higher than in my plan | you want {kin} as a guarantor for {thing}
  | the pause of the repayments that we agreed on was ignored | the papers for the mortgage disappeared {since}
  | I was sold an insurance of {sum} along with the credit for {thing}
  | you count the interest on the debt for {thing} wrongly | the last instalment was paid, yet you ask for {sum}
thing: the car | the kitchen | the roof | my studies | the flat | the tractor | the wedding
transfer: {sum} that I sent to {kin} {since} has not arrived | the standing order for the rent ran twice
  | {sum} went to a stranger because your form changed a digit | you sent {sum} to {place} {long} late
  | sending {sum} to {place} cost me a fee that nobody mentioned | the rent did not reach my landlord {since}
  | my salary from {place} did not come in {since} | I called back {sum} to {kin} in time, and you sent it anyway
  | the direct debit of the gas company was returned {since} without reason
  | the code to release {sum} to {place} never comes | money from {place} was changed at a miserable rate
  | my order to pay the bill for {thing} is pending {since}
aside-card: my card works well by now | the cash machine was mended | I still like paying with the gold one
  | the limit at {checkout} is no longer a problem
aside-account: I have my savings with you too | the joint balance is in order
  | the statement of my deposit was correct | I do not mind the monthly charge
aside-loan: the mortgage is nearly paid off | the instalment for {thing} is in order
  | my credit for {thing} went through well | you gave me a fair rate for the house
aside-transfer: my salary came in on {day} | the standing order works | what I sent to {place} arrived in the end
  | the money for {kin} came on {day}
since: since {day} | for {long} | two weeks ago | on {day} | again | in spite of my letter of {day}
long: three hours | ten days | a month | six weeks | half a year
sum: 12 euros | 45 euros | 80 pounds | 250 dollars | 1,200 euros | 19.90 | 3,000 francs | 640 euros
place: Lisbon | the airport | Poland | Canada | the station | Vienna | Turkey | the old town
kin: my daughter | my brother | my late father | my wife | my tenant | my partner | my aunt
"""

SHOP = """
labels: negative | positive
once: thing | part | user
message: {core}. | {core}. {close} | {core}. | {intro} {core}. | {intro} {core}. {close} | {aside}, but {core}.
  | {aside}; still, {core}. | Although {aside}, {core}. | {core}, even if {aside}.
intro: Bought {thing} for {user}: | After {time} with {thing}: | My verdict on {thing} after {time}:
  | {thing}, ordered {time} ago: | {user} wanted {thing}, so here we are: | Second time that I order {thing}:
close: So much for {thing}. | That is all I can say after {time}. | {user} says the same. | You decide.
  | I have had it for {time}.
positive: {thing} has not let me down once | I would not give {thing} away again
  | there is nothing I could complain about | {user} fights with me over who may use {thing}
  | the {part} is better than on one at twice the price | it survived {strain} without a scratch
  | {time} later the {part} still works like on the first day | I feared {fear}, and was wrong
  | nothing of the {fear} that others write about here | I can hardly believe how little I paid
  | the {part} does what it should, no fuss | {user} has stopped asking for a new one | {thing} was worth the wait
  | one would have to look long for a flaw in the {part} | I have ordered a second one for {user}
  | it put an end to {fear}
negative: {thing} went back after {time} | I would give {thing} away if anybody took it
  | there is nothing that I could praise | {user} refuses to touch {thing} again
  | the {part} is worse than on one at half the price | it did not survive {strain}
  | {time} later the {part} hangs loose | I hoped for an end to {fear}, and was wrong
  | all the {fear} that others write about here | I can hardly believe how much I paid | the {part} does what it wants
  | {user} keeps asking for a real one | {thing} was not worth the wait
  | one need not look long for a flaw in the {part} | I ordered one and wish that I had bought none
  | it was the start of {fear}
aside-positive: the {part} looks nice | delivery was fast | the {part} feels solid at first | the colour is lovely
  | the price was fair | {user} liked the {part} | the shop was friendly | it went well at first | others praise it
aside-negative: the {part} looks cheap | delivery was slow | the {part} feels flimsy at first | the colour is ugly
  | it was not cheap | {user} disliked the {part} | the shop was rude | it was a struggle at first
  | others complain about it
thing: the kettle | this lamp | the backpack | the blender | this chair | the vacuum cleaner | the tent
  | the headphones | this jacket | the coffee grinder | the alarm clock | the scooter | this pan | the fan
part: handle | switch | lid | zip | battery | cable | surface | stitching | motor | base | strap | display
user: my sister | my boss | the whole family | my flatmate | our teenager | my grandfather | the neighbour | my wife
time: two weeks | a month | three days | half a year | a whole winter | one weekend | an hour | two years
strain: a fall down the stairs | one summer with the kids | daily use | a week of rain | the move | the dishwasher
fear: cracks | rattling | a smell of plastic | leaks | stains | sleepless nights | wobbling | broken seams
"""

CITY = """
labels: parks | roads | waste | water
message: {core}. | {core}. {close} | {hello} {core}. | {hello} {core}. {close} | {aside}. {core}.
  | {aside}, but {core}. | {core}. {aside}. | {hello} {aside}; now {core}.
hello: Hello, | To the city office: | Good morning, | I want to report something: | Dear council,
  | As a resident of {street}:
close: Please send someone. | Who is in charge of this? | It is a disgrace. | My neighbours say the same.
  | Somebody will get hurt. | Thank you for your work. | I have a photograph. | I already called twice.
roads: the {hole} {near} gets deeper with every bus | the lamp {near} has been dark {since}
  | the signal {near} stays red for minutes | the stripes for pedestrians {near} have worn off
  | a sign {near} points the wrong way {since} | the kerb {near} has crumbled
  | cars race past {near} and there is no bump to slow them | frost has lifted the paving {near}
  | the railing of the bridge {near} is bent | nobody gritted the slope {near} and people slip
  | parked vans block the view {near} | the cycle lane ends without warning {near}
hole: hole | crack in the surface | dip | gap in the paving
waste: the bins {near} have not been emptied {since} | somebody left an old {junk} {near}
  | the lorry skipped our house {since} | the container for glass {near} is overflowing
  | bags are piling up {near} and draw rats | I need a bigger bin for {junk2} | where may I hand in a broken {junk}
  | the brown bin was not returned to us {since} | broken bottles have been lying {near} {since}
  | the collection of {junk2} did not come on {day} | a {junk} was dumped {near}
  | the calendar for collecting {junk2} is wrong
junk: sofa | fridge | mattress | television | car tyre | washing machine
junk2: paper | garden cuttings | nappies | cardboard | old paint
parks: a branch {near} hangs by a thread | the swing {near} has a broken chain
  | the grass {near} has stood knee-high {since} | the bench {near} has lost two boards
  | the roses {near} have been dying {since} | the hedge {near} covers the whole path
  | dogs run free among the toddlers {near} | a chestnut {near} looks hollow and leans
  | the goal on the football pitch {near} fell over | may we hold a picnic {near} on {day}
  | moles have ruined the lawn {near} | roots {near} have killed the flower bed
water: there has been no pressure on the third floor {since} | it has come out of the tap brown {since}
  | the drain {near} gurgles and overflows | a main seems to have burst {near}, the cellar is filling
  | the meter in our cellar runs backwards | the hydrant {near} has been dripping {since}
  | it has smelt of sewer {near} {since} | the fountain for drinking {near} is dry
  | the cover of the manhole {near} rattles | our tap has tasted of chlorine {since}
  | the gully {near} is blocked and everything floods when it rains | the last meter reading was never asked for
near: in {street} | at the corner of {street} | by the playground | next to the recycling yard
  | opposite the pumping station | at the edge of the park | behind the bus stop | under the trees at {street}
  | beside the fountain | at the car park | along the canal | near the waste depot | in front of the school
  | below the road bridge
aside-roads: the pothole in {street} was filled well | the street lamps work again | the new crossing is a success
  | the traffic light has been mended
aside-waste: the bins were emptied on time this week | thank you for fetching the old {junk}
  | the rubbish is gone by now | sorting {junk2} goes well
aside-parks: the new benches in the park are lovely | the fallen tree was cleared fast | the lawn looks splendid
  | the playground is popular
aside-water: the burst pipe was mended | the tap runs clear again | the flooded cellar is dry by now
  | the drains were cleaned in spring
since: since {day} | for two weeks | for a month | since the storm | again | since the festival
day: Monday | Tuesday | Wednesday | Thursday | Friday | Saturday | the holiday
street: Mill Lane | Station Road | Linden Street | Harbour Way | the market square | Church Hill | Weaver Street
  | Long Meadow
"""

GRAMMARS = {"clinic": CLINIC, "bank": BANK, "shop": SHOP, "city": CITY}
