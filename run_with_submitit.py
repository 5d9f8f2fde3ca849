"""Submit a training to SLURM, one process a GPU, which saves itself before its time is up and goes on by itself.

    python run_with_submitit.py --nodes 2 --ngpus 8 --job_dir /shared/run1 --model vim_tiny_patch16_224 ...

Flags that are not listed below go to main.py.
"""

from __future__ import annotations

import argparse
import logging
import secrets
import subprocess
import time
from pathlib import Path

import submitit

import main as program
from utils import RunError, UsageError
from utils.flags import Parser, number
from utils.processes import tell_mistake
from utils.signals import StopRequest
from utils.telling import setup_logging

_logger = logging.getLogger(__name__)

JOBS = Path("output", "jobs")


class Training:
    """What every task of the job runs: main.py with `flags`, going on from where the last allocation stopped."""

    def __init__(self, flags: list[str]) -> None:
        self.flags = flags

    def __call__(self) -> None:
        # submitit ends a job on its signal at once; main.py takes the handler over, and saves first
        stop = StopRequest()
        submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        code = program.main(self.flags, stop)
        if code:
            raise RunError(f"main.py ended with code {code}.")
        job = submitit.JobEnvironment()
        if stop and job.global_rank == 0 and job.name() == "slurm":
            subprocess.run(["scontrol", "requeue", job.job_id], check=True)


def get_args_parser() -> Parser:
    """The parser of the job's flags."""
    parser = Parser(
        prog="run_with_submitit.py",
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--nodes", type=number(int, 1), default=1, help="machines (default: 1)")
    parser.add_argument("--ngpus", type=number(int, 1), default=8, help="GPUs, and processes, a machine (default: 8)")
    parser.add_argument("--cpus", type=number(int, 1), default=10, help="cores a process (default: 10)")
    parser.add_argument("--timeout", type=number(int, 1), default=2800, help="minutes an allocation (default: 2800)")
    parser.add_argument(
        "--job_dir",
        "--job-dir",
        type=Path,
        default=None,
        help=f"shared folder of logs and output (default: a new one in {JOBS}, named by the time)",
    )
    parser.add_argument(
        "--use_volta32", "--use-volta32", action="store_true", help="only machines with V100 GPUs of 32 GB"
    )
    parser.add_argument("--partition", default=None, help="SLURM partition")
    parser.add_argument("--comment", default="", help="comment for the scheduler")
    parser.add_argument("--job-name", default="vim", help="default: vim")
    parser.add_argument("--cluster", default="slurm", choices=("slurm", "local"), help="'local' runs on this machine")
    return parser


def submit(argv: list[str] | None = None) -> submitit.Job:
    """Check all flags here, before anything waits in a queue, then submit the job."""
    parser = get_args_parser()
    args, flags = parser.parse_known_args(argv)
    if args.job_dir is None:
        # one folder for all allocations of the job, which another one of this second does not have
        args.job_dir = JOBS / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    if "--output_dir" not in flags and "--output-dir" not in flags:
        flags += ["--output_dir", str(args.job_dir)]
    if not any(flag.partition("=")[0] == "--resume" for flag in flags):
        flags += ["--resume", "auto"]
    program.parse(flags)
    if args.use_volta32 and args.cluster != "slurm":
        raise UsageError(f"--use_volta32 chooses machines of SLURM; wanted it without --cluster {args.cluster}.")
    executor = submitit.AutoExecutor(folder=args.job_dir / "jobs", cluster=args.cluster)
    slurm = {"slurm_partition": args.partition, "slurm_comment": args.comment, "slurm_signal_delay_s": 180}
    if args.use_volta32:
        slurm["slurm_constraint"] = "volta32gb"
    executor.update_parameters(
        name=args.job_name,
        nodes=args.nodes,
        tasks_per_node=args.ngpus,
        cpus_per_task=args.cpus,
        timeout_min=args.timeout,
        **({"gpus_per_node": args.ngpus, **slurm} if args.cluster == "slurm" else {}),
    )
    job = executor.submit(Training(flags))
    _logger.info("Submitted job %s; its logs and output are in %s.", job.job_id, args.job_dir)
    return job


if __name__ == "__main__":
    setup_logging()
    try:
        submit()
    except UsageError as error:
        tell_mistake(error)
        raise SystemExit(2) from None
