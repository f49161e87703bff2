"""SmartFed (arXiv 2512.00902, ICML 2026): existing LoRAs, reused as rank-1 experts; only routers train and travel.

1. Pool: every LoRA is cut along its rank; expert i of a matrix is B_i A_i x with A_i [1, d_in], B_i [d_out, 1]. Frozen;
   sent to a client once, then named by its SHA-256; sent again to a client that reports its loss.
2. MoRE: y = W0 x + sum_{i in top-K_m} g_i B_i A_i x with g from a router W [N_m, d_in] per matrix m and per token
   (:func:`coterie.nn.gates.top_k`). That is ``router = "paper"``; by default each expert has one signed weight.
3. Rounds: a client trains the routers and its head, and uploads them; the server averages them by examples.
4. EEQA, with that router: a budget of active experts is divided among the matrices by importance, which clients
   measure every ``quota_interval`` rounds and upload as a number per matrix (:mod:`coterie.ops.quota`).

No code is published. The formulas are in the paper (13 equations, one algorithm), which we have not been able to read:
``gate_scale``, ``importance`` and ``quota`` are reconstructions (docs/methods/smartfed.md says which steps are the
paper's).
Ours: routers in the experts' own coordinates (``router``), a fresh expert beside the pool (``fresh_rank``), pool
adapters that train (``train_experts``), adapters dropped for lack of use (``drop_below``), whole adapters as experts
(``granularity = "adapter"``, a control), dropout on the frozen experts' input in training.
"""

from coterie.methods.smartfed.method import SmartFed

METHOD = SmartFed
