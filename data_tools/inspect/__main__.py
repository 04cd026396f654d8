"""``python -m data_tools.inspect INDEX`` is `inspect_index.py`. A folder without ``__init__.py`` does not hide Python's own ``inspect``
from the scripts beside it, as a file ``inspect.py`` would."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))  # also found when the folder itself is run

from data_tools.inspect_index import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
