"""FedAMoLE (arXiv 2411.19128, WWW 2026): experts of a pool choose the clients whose data fits them.

1. Every module has a pool of E experts, a shared expert and a token projection P. A client holds a few experts of
   each pool, different ones in every module:
   y = W0 x + s [B_s A_s x~ + sum_{e in top-k} w_e B_e A_e x~], w = softmax over the k largest of
   (A_e x . P x) / sqrt r (:func:`coterie.nn.gates.scaled_dot_product`).
2. With what they received, clients measure t = mean_t P x. They then train all that they hold, with a load-balance loss
   beside the task's.
3. The server averages every expert over its holders, shared expert and P over all clients.
4. Reverse selection (RSEA), each round but the last: every expert picks as many clients as are alike
   (:mod:`coterie.methods.fedamole.groups`) by how well their data fits
   (:func:`coterie.methods.fedamole.selection.likeness`), so that the sum over the picks is largest and every client
   gets a number of experts within bounds (:mod:`coterie.ops.assign`). In round 1 each expert has one client, at random.

Differs from the paper, where every expert picks the same number of clients (``clients_per_expert = 2``), which measure
after training, on rows that they hold out (``embed = "after"``, ``embed_rows = "held_out"``), and experts choose by
softmax over clients of (e . t_c) / sqrt r with e = mean_t A_e x, whoever holds them (``prototype = "experts"``,
``inertia = 0``), from ``clients_per_expert`` first holders on.

Differs from the published code (commit 41ebf75), whose behaviour ``examples/fedamole-published.toml`` restores: all
experts share one dropout mask (there, each has its own: ``dropout_masks = "per_expert"``); padding tokens count neither
in the load-balance loss nor in embeddings (there they do: ``padding = "counted"``); the best round is chosen on
validation data (there, on test data: not offered); the assignment is a linear program with the same optimum as SCIP's.
The code's noise on embeddings is left out: it bounds nothing (it clips one batch only, and has no accountant).
Ours: ``experts`` follows the number of clients unless set; a client that has not replied yet is like nobody, and
experts wait up to three rounds for all first replies (``prototype = "experts"``: it has the mean of the others' token
embeddings); an expert whose holders all missed a round is unchanged; a client that comes after the
start trains the shared expert in its first round, and experts choose it like the others from then on.
"""

from coterie.methods.fedamole.method import FedAMoLE
from coterie.methods.fedamole.settings import FedAMoLESettings
from coterie.methods.fedamole.state import FedAMoLEState

__all__ = ["METHOD", "FedAMoLE", "FedAMoLESettings", "FedAMoLEState"]

METHOD = FedAMoLE
