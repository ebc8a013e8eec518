"""For scripts and loops of your own: what ``fit`` and the experiments run with.

``progress_bar`` shows progress on a terminal; ``stop_requests`` makes Ctrl-C and SIGTERM a request
to stop at the next good place; ``lock`` keeps a second process out of a folder; ``need`` imports a
package on use and says how to install it; ``console`` prints tables; ``positive_int`` checks a
number and names the argument.
"""

from unrollgrad._checks.arguments import positive_int
from unrollgrad._core.optional_packages import console, need
from unrollgrad._core.progress import progress_bar
from unrollgrad._fit.checkpoints import lock
from unrollgrad._fit.interrupts import stop_requests

__all__ = ["console", "lock", "need", "positive_int", "progress_bar", "stop_requests"]
