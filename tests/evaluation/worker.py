"""One of several processes that evaluate; `test_processes.py` starts them.

worker.py PORT PROCESSES PROCESS COMMANDS.json        each command as eval.py gets it, in turns
"""

import json
import sys
from pathlib import Path

import eval as evaluate
from dsv3.errors import exits_cleanly
from dsv3.parallel import launch


@exits_cleanly
def main(port, processes, process, commands):
    def work():
        for arguments in json.loads(Path(commands).read_text()):
            evaluate.work(evaluate.parser().parse_args(arguments))

    place = launch.place_of(f"127.0.0.1:{port}", int(processes), int(process))
    launch.run(place, 120, work)


if __name__ == "__main__":
    main(*sys.argv[1:])
