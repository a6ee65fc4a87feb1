"""Failing examples as files: small, readable, and the same bits wherever they are replayed."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from deepep.sim.cases.case import Case
from deepep.sim.fuzz.fuzzer import Finding

FORMAT = "deepep.failing-example"
VERSION = 1


@dataclass(frozen=True)
class StoredExample:
    """A stored example: the cases to run in order, and what failed when it was written."""

    subject: str
    rule: str
    message: str
    cases: tuple[Case, ...]

    @staticmethod
    def of(finding: Finding) -> StoredExample:
        return StoredExample(finding.subject, finding.rule, finding.message, finding.cases)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file (JSON)."""
        plain = {
            "format": FORMAT,
            "version": VERSION,
            "subject": self.subject,
            "rule": self.rule,
            "message": self.message,
            "cases": [json.loads(case.to_json()) for case in self.cases],
        }
        Path(path).write_text(json.dumps(plain, indent=1) + "\n")

    @staticmethod
    def load(path: str | os.PathLike[str]) -> StoredExample:
        """Reads a failing example, or a file with a single case.

        Raises:
            ValueError: the file is neither, or of another version.
            OSError: it cannot be read.
        """
        text = Path(path).read_text()
        plain = json.loads(text)
        if not isinstance(plain, dict) or plain.get("format") != FORMAT:
            return StoredExample("", "", "", (Case.from_json(text),))
        if plain.get("version") != VERSION:
            raise ValueError(f"{path}: version: got {plain.get('version')}; allowed: {VERSION}")
        cases = tuple(Case.from_json(json.dumps(case)) for case in plain["cases"])
        return StoredExample(plain["subject"], plain["rule"], plain["message"], cases)
