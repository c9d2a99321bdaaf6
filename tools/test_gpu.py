"""A rehearsal of tools/gpu.sh: both commands, with tiny shapes, without a GPU."""
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
FIRST = ["machine", "parity", "bandwidth", "decode:opt-1.3b", "ppo_step"]
SECOND = ["ragged", "profile", "decode:llama-3.2-1b", "gpt2", "generate_batch", "nano_vllm",
          "equal_rows"]


def test_both_commands_do_every_section_and_leave_one_archive_each(tmp_path):
    environment = os.environ | {"TINY": "1", "PYTHON": sys.executable, "RUN": str(tmp_path / "run"),
                                "OMP_NUM_THREADS": "1"}
    for part, sections in (("1", FIRST), ("2", SECOND)):
        out = tmp_path / part
        subprocess.run(["bash", ROOT / "tools/gpu.sh", part], check=True, capture_output=True,
                       env=environment | {"OUT": str(out)})
        assert [path.name for path in out.iterdir()] == ["gpu.tgz"]
        with tarfile.open(out / "gpu.tgz") as archive:
            log = archive.extractfile(f"{part}/log.txt").read().decode()
            lines = archive.extractfile(f"{part}/gpu.jsonl").read().decode().splitlines()
        rows = [json.loads(line) for line in lines]
        assert {row["name"]: row["failed"] for row in rows if row["section"] == "time"} == \
            dict.fromkeys(sections), log
        for row in rows:
            if row["section"] == "parity":
                assert row["wrong_rows"] == 0 and row["graph_is_eager"], row
                assert row["bf16_gap_mean"] < 0.05, row
            if row["section"] == "equal_rows":  # in float32 all are
                assert row["equal"] == row["rows"], row
    assert "test_packed_prefill_is" in log, "no kernel test has the names that gpu.sh runs"
