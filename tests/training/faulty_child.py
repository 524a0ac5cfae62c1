"""One process of a toy run that does itself harm: python -m tests.training.faulty_child WORKDIR.

FAULT in the environment is JSON: {"action": "kill", "process": 1, "step": 3, "pace": 0.1}; "late"
holds back what the guilty one's watchdog says, in seconds, and "linger" the end of process 1 after
all are ready to leave. Every process also writes the example
numbers of its steps into WORKDIR/ids-N.jsonl, and the guilty one the time of its deed into
WORKDIR/deed.txt.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from cwcl_jax.cli import exit_code
from cwcl_jax.config import from_json
from cwcl_jax.training import coordination, distributed

WORKDIR = Path(sys.argv[1])
FAULT = json.loads(os.environ.get("FAULT", "{}"))
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}


def act(action: str) -> None:
    """Does the deed, after writing down when."""
    (WORKDIR / "deed.txt").write_text(repr(time.time()))
    if action in SIGNALS:
        os.kill(os.getpid(), SIGNALS[action])
        if action == "term":  # the runtime looks for it once a second; the run may be shorter
            while not coordination.preemption_is_noticed():
                time.sleep(0.05)
    elif action == "raise":
        raise RuntimeError("no such luck")
    elif action == "hang":
        time.sleep(1e6)
    else:
        raise ValueError(action)


def guilty(place: str) -> bool:
    """Whether this process is to act at `place`: "start", "step", "save" or "evaluation"."""
    import jax

    return FAULT.get("place", "step") == place and FAULT.get("process") == jax.process_index()


def prepare() -> None:
    """Puts the fault, the pace and the record of example numbers into the run's code."""
    from cwcl_jax.training.checkpoint import Checkpoints
    from cwcl_jax.training.encode import Encoder
    from cwcl_jax.training.loop import Loop
    from cwcl_jax.training.watchdog import Watchdog

    advance, save, encode = Loop._advance, Checkpoints.save, Encoder.encode
    write_stacks, leave_together = Watchdog._report, distributed._leave_together
    calls = [0]

    def faulty_advance(self, state, locked, batches, number):
        import jax

        if guilty("step") and number == FAULT["step"]:
            act(FAULT["action"])
        time.sleep(FAULT.get("pace", 0))
        state, batch = advance(self, state, locked, batches, number)
        with (WORKDIR / f"ids-{jax.process_index()}.jsonl").open("a") as file:
            file.write(json.dumps({"step": number, "ids": batch.index.tolist()}) + "\n")
        return state, batch

    def faulty_save(self, step, state, data_state, best=None):
        save(self, step, state, data_state, best)
        if guilty("save") and step == FAULT["step"]:
            act(FAULT["action"])

    def faulty_encode(self, *arguments, **options):
        calls[0] += 1
        if FAULT.get("place") == "evaluation":
            time.sleep(0.5)  # in which the other processes hear of a signal
            if guilty("evaluation") and calls[0] == 2:
                act(FAULT["action"])
        return encode(self, *arguments, **options)

    def late_report(self, message):
        if guilty("step"):
            time.sleep(FAULT.get("late", 0))
        write_stacks(self, message)

    def lingering_leave(name):
        leave_together(name)
        if distributed.jax.process_index() == 1:
            time.sleep(FAULT.get("linger", 0))

    Loop._advance, Checkpoints.save, Encoder.encode = faulty_advance, faulty_save, faulty_encode
    Watchdog._report, distributed._leave_together = late_report, lingering_leave


if __name__ == "__main__":
    WORKDIR.mkdir(parents=True, exist_ok=True)
    experiment = from_json((WORKDIR.parent / "experiment.json").read_text())
    distributed.initialize(experiment.distributed)
    prepare()
    from cwcl_jax.training import run

    if guilty("start") and FAULT["action"] == "differ":
        run.code_version = lambda: "something else"
    elif guilty("start"):
        act(FAULT["action"])
    sys.exit(
        distributed.run_main(
            lambda watchdog: run.train(experiment, WORKDIR, watchdog),
            experiment.distributed,
            code_of=exit_code,
            logs=WORKDIR / "logs",
        )
    )
