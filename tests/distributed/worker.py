"""One rank: runs the functions that it is asked for, until it is asked no more. See conftest.py."""

import importlib.util
import os
import sys
import traceback
from multiprocessing.connection import Client

import torch
import torch.distributed as dist


def function(path, name, modules={}):  # noqa: B006 -- a cache
    if path not in modules:
        spec = importlib.util.spec_from_file_location(f"case_{len(modules)}", path)
        modules[path] = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = modules[path]
        spec.loader.exec_module(modules[path])
    return getattr(modules[path], name)


def main(address, rank, size, store):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    with Client(address) as parent:
        parent.send(rank)
        while (request := parent.recv()) is not None:
            path, name, args, kwargs = request
            torch.manual_seed(0)
            try:
                answer = True, function(path, name)(*args, **kwargs)
            except Exception:
                answer = False, traceback.format_exc()
            parent.send(answer)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
