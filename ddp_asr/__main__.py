"""`python -m ddp_asr COMMAND ...`, see cli.py."""

from ddp_asr.cli import entry_point

if __name__ == "__main__":
    raise SystemExit(entry_point())
