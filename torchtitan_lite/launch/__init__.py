"""The processes of a run: how they start, meet, are watched, stop on request, and end.

scheduler.py    recognise srun and mpirun, and make their processes ranks
torchrun.py     start the ranks of a machine and forward signals to them
torchrun_hook.py  print a line, and no traceback, when a signal ends plain torchrun
world.py        this rank's number, the meeting of the ranks, collectives, and work in a thread
guard.py        guard one process: handle its signals, watch its progress, end all ranks together
signals.py      SIGTERM, SIGUSR1, SIGINT, SIGHUP: a request to save and stop
cause.py        find the rank that caused the run to end
end.py          how a run ends: exit status, outcome, message
output.py       standard output and standard error, whose failures must not end a run
log.py          the lines that a run prints, and the file log.txt that keeps them
command.py      the command lines that a run prints
process.py      settings of the whole process
"""
