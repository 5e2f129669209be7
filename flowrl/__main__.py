"""`python -m flowrl`, which is also what `accelerate launch -m flowrl` runs."""

from flowrl.cli import main

main()
