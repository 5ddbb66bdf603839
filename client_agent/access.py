"""Files that this process may not read. A service's user often does not own these files, so messages name the user."""

import os
import pwd
from pathlib import Path


def denial(path: Path) -> str:
    """Why this process may not read a file, or a folder and the files in it; "" if it may, or if nothing is there."""
    try:
        places = [path, *path.iterdir()] if path.is_dir() else [path]
        return next(
            (denied(place) for place in places if place.exists() and not os.access(place, os.R_OK)), ""
        )
    except PermissionError as error:
        return denied(error.filename)
    except (OSError, ValueError):  # no name that a file can have
        return ""


def denied(place: Path | str) -> str:
    """What is said of a place that this process may not read."""
    user = _user()
    return (
        f"{place} may not be read by the user {user}: give it to that user (chown -R {user}), or a copy of it"
    )


def unwritable(folder: Path) -> str:
    """Why this process may not put files into a folder; "" if it may."""
    if os.access(folder, os.W_OK | os.X_OK):
        return ""
    return f"the user {_user()} may not write to {folder}: give it to that user (chown -R {_user()}), or take another"


def _user() -> str:
    number = os.geteuid()
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)
