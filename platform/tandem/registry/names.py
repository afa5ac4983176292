"""Names in the registry: promotions, their history, and the nearest names to an unknown one."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from tandem.db.schema import ModelRow, NameRow, PromotionRow
from tandem.errors import RegistryError, UnknownModelError, UnknownVersionError, did_you_mean
from tandem.ids import is_hub_name, split_version, versioned

NEAR = 100
"""Names on either side of a wrong one, in the order of the alphabet, that are looked at for the nearest."""
SHOWN = 10


def find(session: Session, name_or_id: str, *, suggest: bool = True) -> ModelRow:
    """The row that `name@version` or a bare name means; UnknownModelError if there is none (`suggest`: with near names)."""
    name, version = split_version(name_or_id)
    if version is not None:
        row = session.get(ModelRow, versioned(name, version))
        if row is not None:
            return row
        if others := versions_of(session, name, SHOWN + 1):
            raise UnknownVersionError(f"{name} has no version {version}; it has {some(others)}.")
    else:
        known = session.get(NameRow, name)
        row = session.get(ModelRow, known.promoted) if known is not None and known.promoted else None
        if row is not None:
            return row
        if others := versions_of(session, name, SHOWN + 1):
            raise UnknownVersionError(
                f"No version of {name} is promoted; it has {some(others)}. Ask for {versioned(name, others[0])}, or promote one: "
                f"`tandem adapters promote {versioned(name, others[0])}`."
            )
    if not suggest:
        raise UnknownModelError(f"No model or adapter {name_or_id!r} is registered.")
    names = near(session, name)
    known_ones = (
        f" Registered: {some(names)}."
        if names
        else (
            " Nothing is registered yet: train a model (`tandem train submit`), pull one (`tandem models pull ORG/NAME`), or "
            "name a folder in Hugging Face's format (./FOLDER)."
        )
    )
    pull = f" `tandem models pull {name}` brings it from the Hugging Face hub." if is_hub_name(name) else ""
    raise UnknownModelError(
        f"No model or adapter {name_or_id!r} is registered.{did_you_mean(name, names)}{pull}{known_ones}"
    )


def check_owner(session: Session, name: str, tenant: str | None) -> None:
    """RegistryError where a name that is in use does not belong to `tenant`; None: whoever has it."""
    known = session.get(NameRow, name)
    if known is not None and tenant is not None and known.tenant != tenant:
        owner = f"belongs to the tenant {known.tenant}" if known.tenant else "is shared by all tenants"
        raise RegistryError(f"The name {name} {owner}. Choose another name for a version of {tenant}.")


def next_version(session: Session, name: str, kind: str, tenant: str | None) -> int:
    """Take the number of a name's next version; a new name belongs to `tenant`."""
    known = session.get(NameRow, name)
    if known is None:
        known = NameRow(name=name, kind=kind, last_version=0, tenant=tenant)
        session.add(known)
    known.kind = kind
    known.last_version += 1
    session.flush()
    return known.last_version


def find_versions(session: Session, name_or_id: str) -> list[ModelRow]:
    """The row of `name@version`, or those of all versions of a name, oldest first; UnknownModelError if there is none."""
    name, version = split_version(name_or_id)
    if version is None and (numbers := versions_of(session, name)):
        return [session.get_one(ModelRow, versioned(name, number)) for number in reversed(numbers)]
    return [find(session, name_or_id)]


def versions_of(session: Session, name: str, limit: int | None = None) -> list[int]:
    """The versions of a name, newest first."""
    query = select(ModelRow.version).where(ModelRow.name == name).order_by(ModelRow.version.desc()).limit(limit)
    return list(session.scalars(query))


def near(session: Session, word: str) -> list[str]:
    """Promoted names around where `word` would stand in the alphabet: few, however many there are."""
    names = select(NameRow.name).where(NameRow.promoted.is_not(None))
    after = session.scalars(names.where(NameRow.name >= word).order_by(NameRow.name).limit(NEAR)).all()
    before = session.scalars(names.where(NameRow.name < word).order_by(NameRow.name.desc()).limit(NEAR)).all()
    return [*reversed(before), *after]


def promote(session: Session, row: ModelRow) -> bool:
    """Make a version what its name means; whether it was not that already."""
    name = session.get_one(NameRow, row.name)
    if name.promoted == row.id:
        return False
    name.promoted = row.id
    session.add(PromotionRow(name=row.name, version=row.version, at=datetime.now(UTC), taken_back=False))
    session.flush()
    return True


def roll_back(session: Session, name: str) -> ModelRow:
    """Take the newest promotion back; the row that the name means then. RegistryError if there is none before it."""
    known = session.get(NameRow, name)
    if known is None or known.promoted is None:
        return find(session, name)  # raises, with what there is
    now = split_version(known.promoted)[1]
    before = next((p for p in _standing(session, name) if p.version != now), None)
    if before is None:
        raise RegistryError(
            f"{known.promoted} is the only version of {name} that was ever promoted, so there is none to go back to. "
            f"It has {some(versions_of(session, name, SHOWN + 1))}; promote another by its id."
        )
    # Where the one in between was removed, the same version stands there twice in a row.
    for promotion in _standing(session, name):
        if promotion.id == before.id:
            break
        promotion.taken_back = True
    known.promoted = versioned(name, before.version)
    return session.get_one(ModelRow, known.promoted)


def forget(session: Session, name: str, versions: Iterable[int]) -> None:
    """Take back every promotion of versions that were removed; the name then means the one promoted before."""
    gone = list(versions)
    promotions = select(PromotionRow).where(PromotionRow.name == name, PromotionRow.version.in_(gone))
    for promotion in session.scalars(promotions):
        promotion.taken_back = True
    session.flush()
    known = session.get_one(NameRow, name)
    if known.promoted is not None and split_version(known.promoted)[1] in gone:
        left = next(iter(_standing(session, name)), None)
        known.promoted = versioned(name, left.version) if left else None


def history(session: Session, name: str) -> list[PromotionRow]:
    """All promotions of a name, newest first."""
    return list(session.scalars(select(PromotionRow).where(PromotionRow.name == name).order_by(PromotionRow.id.desc())))


def some(words: Iterable[object]) -> str:
    """The first words, and that there are more."""
    shown = [str(word) for word in words]
    return ", ".join(shown[:SHOWN]) + (", and more" if len(shown) > SHOWN else "")


def _standing(session: Session, name: str) -> list[PromotionRow]:
    return [promotion for promotion in history(session, name) if not promotion.taken_back]
