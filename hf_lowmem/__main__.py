"""`python -m hf_lowmem ...` does what `hf-lowmem ...` does; launchers use it as `-m hf_lowmem script.py ARGS`."""

import sys

from hf_lowmem.cli import main

if __name__ == "__main__":
    sys.exit(main())
