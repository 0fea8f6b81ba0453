"""Run by torchrun: rank 1 objects, then fails at its second turn; ranks say what they hear."""

import sys
from pathlib import Path

from freeadv_fast.distributed.world import join_world, leave_world
from freeadv_fast.errors import UserError


def main(output):
    """Writes the message that this rank received."""
    world = join_world()

    def turn(number):
        if world.rank == 1 and number == 1:
            raise UserError("image 7 cannot be decoded")
        return number

    objections = ["", "no" * world.rank, f"rank {world.rank}"]
    told = [world.first_objection(objection) for objection in objections]
    try:
        told += [world.together(lambda number=number: turn(number)) for number in range(3)]
    except UserError as error:
        told.append(str(error))
    Path(output, f"told{world.rank}").write_text(repr(told))
    leave_world()


if __name__ == "__main__":
    main(sys.argv[1])
