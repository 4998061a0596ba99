"""Let ``transformers`` load gemq checkpoints in programs that never ``import gemq``: a hook in site-packages.

Off unless asked for (``gemq auto-import on``). Two files are written beside the installed packages: a ``.pth`` file,
one line that Python runs at every start, and the module that it imports, a copy of :mod:`gemq.transformers_hook`. That
module only puts a finder on ``sys.meta_path``, which waits for transformers' quantizers. A start of Python costs one
small import, and gemq is imported when a gemq checkpoint is loaded. With gemq removed transformers works as before;
with a broken one it loads everything but gemq checkpoints, which are refused with the reason.
"""

from __future__ import annotations

import os
import sysconfig
import tempfile
from pathlib import Path

from gemq import transformers_hook
from gemq.errors import GemqError

PTH_FILE = "_gemq_auto_import.pth"
MODULE_FILE = "_gemq_auto_import.py"

# an exception here would be printed at every start of Python
PTH_LINE = 'import sys; exec("try:\\n import _gemq_auto_import\\nexcept Exception:\\n pass")\n'

MODULE = Path(transformers_hook.__file__).read_text(encoding="utf-8")


def folder() -> Path:
    """Return the folder in which the running Python looks for packages and ``.pth`` files."""
    return Path(sysconfig.get_path("purelib"))


def is_on(where: Path | None = None) -> bool:
    """Return True if both files exist with the contents that this version writes."""
    where = where or folder()
    contents = ((PTH_FILE, PTH_LINE), (MODULE_FILE, MODULE))
    return all((where / name).is_file() and (where / name).read_text() == text for name, text in contents)


def turn_on(where: Path | None = None) -> list[Path]:
    """Write the two files, the ``.pth`` file last, and return their paths. Raises :class:`GemqError` if it cannot."""
    where = where or folder()
    written = []
    for name, text in ((MODULE_FILE, MODULE), (PTH_FILE, PTH_LINE)):
        try:
            handle, temporary = tempfile.mkstemp(dir=where, prefix=".gemq", suffix=".tmp")
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    file.write(text)
                os.chmod(temporary, 0o644)
                os.replace(temporary, where / name)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
        except OSError as error:
            raise GemqError(
                f"{where / name} cannot be written ({error.strerror}); use a virtual environment"
            ) from error
        written.append(where / name)
    return written


def turn_off(where: Path | None = None) -> list[Path]:
    """Remove the files, the ``.pth`` file first, and return those that were there."""
    where = where or folder()
    present = [where / name for name in (PTH_FILE, MODULE_FILE) if (where / name).exists()]
    for path in present:
        try:
            path.unlink()
        except OSError as error:
            raise GemqError(f"{path} cannot be removed ({error.strerror})") from error
    return present
