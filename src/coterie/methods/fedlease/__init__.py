"""FedLEASE (arXiv 2509.15087, NeurIPS 2025): one LoRA expert per cluster of clients, and adaptive top-M routing.

1. Warm-up: every client trains one LoRA on its own data; nothing is averaged. All start from the same A.
2. Allocation (:mod:`.allocation`): clients that are alike form M clusters. The paper's way is ``distance = "B"``:
   d(i, j) = mean over modules of 1 - cos(B_i, B_j); average linkage; M by silhouette. The default, ``"auto"``, is ours:
   clusters by the mean inputs of the clients' texts, each split by centred B A where that parts it clearly
   (:mod:`coterie.ops.nested`). Expert e starts as the mean of its members' A and of their B.
3. Rounds: a client trains its cluster's expert, the router and the head; the other experts are frozen
   (:mod:`.method`). The server averages expert and router over the cluster; all experts go to everyone, a router to
   its cluster (:mod:`.server`).
   y = W0 x + s sum_e g_e B_e A_e x, with g from the M largest of 2M-1 slots (:func:`coterie.nn.gates.slot_top_k`).

Differs from the paper: ``distance = "auto"``, with which there may be one cluster; slots are ordered experts first, own
last (a permutation of the router's rows).
Differs from the published code (commit cf18cd6), whose behaviour ``examples/fedlease-published.toml`` restores: experts
start as the cluster means (there, each client from its own warm-up LoRA, the other experts at B = 0:
``expert_start = "own"``); the head is trained (there, frozen at its random start: ``head = "frozen"``); all clients
start from one A by the run's seed (there, by an accident of random state).
Ours: clusters may have several experts, each trained by a share of the clients (:mod:`.dealing`); a client may be sent
only the experts that it uses (:mod:`.download`); a client that missed the warm-up makes it up in the next round it
takes part in and joins the nearest cluster (:mod:`.late`).
"""

from coterie.methods.fedlease.method import FedLEASE

METHOD = FedLEASE
