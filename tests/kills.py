"""Runs that are killed at random moments and go on."""

import os
import signal
import subprocess
import sys

from safetensors.torch import load_file

# After a script that defines run(checkpoint, result).
_DRIVER = """
def in_a_process(checkpoint, result, kill_after=None):
    # Forked, for importing torch takes far longer than a run.
    child = os.fork()
    if child == 0:
        run(checkpoint, result)
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]

folder, seed = sys.argv[1], int(sys.argv[2])
random.seed(seed)
began = time.monotonic()
assert in_a_process(None, f"{folder}/unbroken") == 0
lasted = time.monotonic() - began
for _ in range(8):
    print(in_a_process(f"{folder}/kept", f"{folder}/never", random.uniform(0, lasted / 4)), flush=True)
assert in_a_process(f"{folder}/kept", f"{folder}/resumed") == 0
"""


def unbroken_and_resumed(script, folder):
    """Return what a run saves that nothing stopped, what one saves that was killed again and again, and the seed.

    Args:
        script: a program that defines ``run(checkpoint, result)``, which saves tensors as ``result``.
        folder: to work in; the checkpoint is left in ``kept``.
    """
    seed = int.from_bytes(os.urandom(4))  # other moments each time; the seed is shown where it fails
    (folder / "run.py").write_text(script + _DRIVER)
    command = [sys.executable, str(folder / "run.py"), str(folder), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, (seed, done.stderr)
    ends = [int(line) for line in done.stdout.split()]
    assert set(ends) <= {0, signal.SIGKILL}, (seed, done.stderr)
    assert ends.count(signal.SIGKILL) >= 2, (seed, ends)
    expected, found = load_file(folder / "unbroken"), load_file(folder / "resumed")
    assert expected.keys() == found.keys()
    return expected, found, seed
