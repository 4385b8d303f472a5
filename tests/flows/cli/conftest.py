"""What the tests of the command line share."""

RUN_VERBS = ("prepare", "shift", "fit-generator", "plan", "mix", "annotate", "train", "evaluate", "report", "run")
