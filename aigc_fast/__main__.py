"""`python -m aigc_fast` is `aigc-fast`."""

from aigc_fast.cli import main

main()
