"""Made-up systems: the files below /proc and /sys that say what a process may have, in a folder of its own."""

from pathlib import Path

V2 = {"proc/self/cgroup": "0::/user/job", "proc/self/mountinfo": "25 1 0:22 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw"}
V1 = {"proc/self/cgroup": "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n0::/docker/abc",
      "proc/self/mountinfo": "33 1 0:28 /docker/abc /sys/fs/cgroup/cpu,cpuacct ro - cgroup cgroup rw,cpu,cpuacct\n"
                             "34 1 0:29 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n"
                             "35 1 0:30 / /sys ro - sysfs sysfs ro"}


def put(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root
