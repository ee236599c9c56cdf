"""Windows and macOS as the package would meet them, for a child process on Linux.

What they lack is hidden from the package's own modules only: the libraries of this system need it. In every process that has the
folder of :func:`pretend` in ``PYTHONPATH``, workers included, the package also sees their ``sys.platform``. As on Windows,
processes are spawned, and a file that is open or mapped in a process cannot be replaced or removed by it.
"""

import os

_CUSTOMIZE = '''
import builtins, enum, os, signal, sys, types

SYSTEM = {system!r}
UNIX = {{
    "os": """chown fchdir fchmod fchown fork forkpty fpathconf fstatvfs getegid geteuid getgid getgroups getloadavg getpgid
        getpgrp getpriority getresuid getsid getuid killpg lchown lockf mkfifo nice openpty pathconf pipe2 posix_spawn pread
        pwrite readv register_at_fork sendfile setpgid setpriority setsid setuid statvfs sync sysconf ttyname uname wait wait3
        wait4 waitid writev O_CLOEXEC O_DIRECTORY O_NOFOLLOW O_NONBLOCK O_SYNC WNOHANG""",
    "signal": """SIGHUP SIGUSR1 SIGUSR2 SIGKILL SIGCHLD SIGALRM SIGPIPE SIGQUIT SIGSTOP SIGCONT SIGTSTP alarm setitimer getitimer
        pause pthread_kill pthread_sigmask sigpending sigwait siginterrupt""",
    "mmap": "MADV_DONTNEED MADV_SEQUENTIAL MADV_RANDOM MADV_WILLNEED PROT_READ PROT_WRITE MAP_PRIVATE MAP_SHARED",
    "fcntl": None, "resource": None, "termios": None, "pwd": None, "grp": None, "pty": None, "posix": None,
}}
LINUX = {{
    "os": "posix_fadvise posix_fallocate preadv pwritev sched_getaffinity sched_setaffinity memfd_create", "signal": "",
    "mmap": "",
}}


class Seen(types.ModuleType):
    def __init__(self, module, hidden, **others):
        super().__init__(module.__name__)
        vars(self).update(others)
        vars(self).update(_module=module, _hidden=hidden)

    def __getattr__(self, name):
        if name in self._hidden:
            raise AttributeError(f"{{self.__name__}} of {{SYSTEM}} has no {{name}}")
        return getattr(self._module, name)

    def __setattr__(self, name, value):
        setattr(self._module, name, value)


unix = UNIX if SYSTEM == "win32" else {{}}
hidden = {{name: {{*LINUX[name].split(), *(unix.get(name) or "").split()}} for name in LINUX}}
absent = {{name for name, names in unix.items() if names is None}}
members = {{it.name: it.value for it in signal.Signals if it.name not in hidden["signal"]}}
import mmap
seen = {{
    "os": Seen(os, hidden["os"], name="nt" if SYSTEM == "win32" else "posix"),
    "signal": Seen(signal, hidden["signal"], Signals=enum.IntEnum("Signals", members)),
    "mmap": Seen(mmap, hidden["mmap"]),
    "sys": Seen(sys, set(), platform=SYSTEM),
}}
real_import = builtins.__import__


def import_seen(name, globals=None, locals=None, fromlist=(), level=0):
    if str((globals or {{}}).get("__name__")).startswith("deflow_torchrl"):
        top = name.partition(".")[0]
        if top in absent:
            raise ModuleNotFoundError(f"No module named {{top!r}}", name=top)
        if name in seen:
            return seen[name]
    return real_import(name, globals, locals, fromlist, level)


builtins.__import__ = import_seen
if SYSTEM == "win32":
    import multiprocessing.context, shutil

    for method in ("fork", "forkserver"):
        del multiprocessing.context._concrete_contexts[method]
    multiprocessing.set_start_method("spawn", force=True)
    multiprocessing.get_all_start_methods = lambda: ["spawn"]
    shutil._use_fd_functions = False  # Windows removes folders by path

    def in_use(path):
        path = os.path.realpath(os.fsdecode(path))
        if path.startswith("/dev/shm/"):  # of Linux's own multiprocessing
            return False
        for descriptor in os.listdir("/proc/self/fd"):
            try:
                if os.readlink(f"/proc/self/fd/{{descriptor}}") == path:
                    return True
            except OSError:
                pass
        with open("/proc/self/maps") as maps:
            return any(line.rstrip("\\n").endswith(path) for line in maps)

    def only_closed(function):
        def call(*paths, **kwargs):
            for path in paths:
                if in_use(path):
                    raise PermissionError(13, "another program is using this file", os.fsdecode(path))
            return function(*paths, **kwargs)

        return call

    for name in ("replace", "rename", "unlink", "remove"):
        setattr(os, name, only_closed(getattr(os, name)))
'''


def pretend(system, folder):
    """Environment variables of a process that takes this system for ``win32`` or ``darwin``."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(_CUSTOMIZE.format(system=system), encoding="utf-8")
    search = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": search, "MUJOCO_GL": "egl"}
