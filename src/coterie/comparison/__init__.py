"""Several methods and seeds on one federation, side by side: ``coterie compare``.

:mod:`.study` is the whole: it tunes settings (:mod:`.tuning`), carries out the runs (:mod:`.jobs`, in several processes
:mod:`.processes`), collects what earlier calls have left (:mod:`.collect`), and writes ``compare.json``
(:mod:`.record`) with the figures of every variant (:mod:`.figures`, :mod:`.paired`).
"""

from coterie.comparison.figures import Comparison
from coterie.comparison.study import compare
from coterie.comparison.variants import config_for, folder_of, title_of, variants_of

__all__ = ["Comparison", "compare", "config_for", "folder_of", "title_of", "variants_of"]
