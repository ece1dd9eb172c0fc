"""Load with diffusers and transformers without their warnings and progress bars."""

import contextlib
import threading
import warnings
from collections.abc import Iterator

_LOCK = threading.RLock()


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Log only errors and draw no progress bars, then restore the settings of both libraries.

    One thread at a time may be inside.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    with _LOCK, contextlib.ExitStack() as restored, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of one library about the other
        for library in (diffusers_logging, transformers_logging):
            restored.callback(library.set_verbosity, library.get_verbosity())
            library.set_verbosity_error()
            if library.is_progress_bar_enabled():
                library.disable_progress_bar()
                restored.callback(library.enable_progress_bar)
        yield
