"""`python -m aigc_fast.cli` is `aigc-fast`."""

from . import main

main()
