"""Several processes that do a part of a step together: how they are started, watched, ended, and what they tell.

The command (*controller*) holds the lock of the work and commits. It starts an *agent*, `torch.distributed.run`, which
starts the *workers*. All three meet in a private folder, by files: nothing here needs a socket.
"""
