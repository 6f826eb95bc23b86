"""The processes of a run: how they start, meet, are watched over, are asked to stop, and end.

torchrun.py     starts the ranks of a machine and passes signals on to them
world.py        the ranks: who this one is, how they meet, what they exchange; work in a thread meanwhile
guard.py        one process at work: its signals, its watch, and the end of all ranks together
signals.py      SIGTERM and SIGUSR1: a request to save and stop
cause.py        which of several ranks is the reason that they end
end.py          how a run ends: status, outcome, message
process.py      settings of the whole process
"""
