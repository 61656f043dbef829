"""`python -m sqakd_hf` is the command `sqakd`; `accelerate launch -m sqakd_hf distill ...` launches it."""

from .cli import main


main()
