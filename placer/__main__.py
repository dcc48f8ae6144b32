"""``python -m placer``: the same as the command ``placer``."""

from placer.cli import main

main(prog_name="placer")
