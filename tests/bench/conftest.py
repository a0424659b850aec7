"""Makes `bench` importable. At the end of the path: an installed peft_kernels takes precedence."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent.parent))
