"""The kinds of cases of `scripts/torture.py`: kills, full and failing disks, damage, races, malformed inputs."""
