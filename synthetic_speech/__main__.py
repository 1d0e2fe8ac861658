from ddp_asr.errors import run_entry_point
from synthetic_speech.corpus import main

if __name__ == "__main__":
    raise SystemExit(run_entry_point(main))
