"""The processes of a run: how they start, meet, are watched over, are asked to stop, and end.

torchrun.py     starts the ranks of a machine and passes signals on to them
world.py        the ranks: who this one is, how they meet, what they exchange
guard.py        one process at work: signals, the watch, and what an exception makes of the run
signals.py      SIGTERM and SIGUSR1: a request to save and stop
watch.py        several ranks end together;  cause.py: which of them is the reason
end.py          how a run ends: status, outcome, message
background.py   work in a thread while the main thread gives signs of life
process.py      settings of the whole process
"""
