"""Names in the registry: promotions, their history, and the nearest names to an unknown one."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from tandem.db.schema import ModelRow, NameRow, PromotionRow
from tandem.errors import RegistryError, UnknownModelError, UnknownVersionError, did_you_mean
from tandem.ids import is_hub_name, split_version, versioned

NUM_NEIGHBOURS = 100
"""Names on either side of a wrong one, in the order of the alphabet, that are looked at for the nearest."""
MAX_SHOWN = 10


def find(session: Session, name_or_id: str, *, suggest: bool = True) -> ModelRow:
    """The row that `name@version` or a bare name means; UnknownModelError if there is none (`suggest`: with near names)."""
    name, version = split_version(name_or_id)
    if version is not None:
        row = session.get(ModelRow, versioned(name, version))
        if row is not None:
            return row
        if other_versions := versions_of(session, name, MAX_SHOWN + 1):
            raise UnknownVersionError(f"{name} has no version {version}; it has {listed(other_versions)}.")
    else:
        name_row = session.get(NameRow, name)
        row = session.get(ModelRow, name_row.promoted) if name_row is not None and name_row.promoted else None
        if row is not None:
            return row
        if other_versions := versions_of(session, name, MAX_SHOWN + 1):
            newest = versioned(name, other_versions[0])
            raise UnknownVersionError(
                f"No version of {name} is promoted; it has {listed(other_versions)}. Ask for {newest}, or promote one: "
                f"`tandem adapters promote {newest}`."
            )
    if not suggest:
        raise UnknownModelError(f"No model or adapter {name_or_id!r} is registered.")
    names = near(session, name)
    alternatives = (
        f" Registered: {listed(names)}."
        if names
        else (
            " Nothing is registered yet: train a model (`tandem train submit`), pull one (`tandem models pull ORG/NAME`), or "
            "name a folder in Hugging Face's format (./FOLDER)."
        )
    )
    advice = f" `tandem models pull {name}` brings it from the Hugging Face hub." if is_hub_name(name) else ""
    raise UnknownModelError(
        f"No model or adapter {name_or_id!r} is registered.{did_you_mean(name, names)}{advice}{alternatives}"
    )


def check_owner(session: Session, name: str, tenant: str | None) -> None:
    """RegistryError where a name that is in use does not belong to `tenant`; None: any owner is accepted."""
    name_row = session.get(NameRow, name)
    if name_row is not None and tenant is not None and name_row.tenant != tenant:
        owner = f"belongs to the tenant {name_row.tenant}" if name_row.tenant else "is shared by all tenants"
        raise RegistryError(f"The name {name} {owner}. Choose another name for a version of {tenant}.")


def next_version(session: Session, name: str, kind: str, tenant: str | None) -> int:
    """Take the number of a name's next version; a new name belongs to `tenant`."""
    name_row = session.get(NameRow, name)
    if name_row is None:
        name_row = NameRow(name=name, kind=kind, last_version=0, tenant=tenant)
        session.add(name_row)
    name_row.kind = kind
    name_row.last_version += 1
    session.flush()
    return name_row.last_version


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


def near(session: Session, name: str) -> list[str]:
    """Promoted names around where `name` would stand in the alphabet: few, however many there are."""
    names = select(NameRow.name).where(NameRow.promoted.is_not(None))
    names_after = session.scalars(names.where(NameRow.name >= name).order_by(NameRow.name).limit(NUM_NEIGHBOURS)).all()
    names_before = session.scalars(
        names.where(NameRow.name < name).order_by(NameRow.name.desc()).limit(NUM_NEIGHBOURS)
    ).all()
    return [*reversed(names_before), *names_after]


def promote(session: Session, row: ModelRow) -> bool:
    """Make a version the one that its name means; False if it is already."""
    name = session.get_one(NameRow, row.name)
    if name.promoted == row.id:
        return False
    name.promoted = row.id
    session.add(PromotionRow(name=row.name, version=row.version, at=datetime.now(UTC), taken_back=False))
    session.flush()
    return True


def roll_back(session: Session, name: str) -> ModelRow:
    """Take the newest promotion back; the row that the name means then. RegistryError if there is none before it."""
    name_row = session.get(NameRow, name)
    if name_row is None or name_row.promoted is None:
        return find(session, name)  # raises, with what there is
    current_version = split_version(name_row.promoted)[1]
    previous = next(
        (promotion for promotion in _standing_promotions(session, name) if promotion.version != current_version), None
    )
    if previous is None:
        raise RegistryError(
            f"{name_row.promoted} is the only version of {name} that was ever promoted, so there is none to go back to. "
            f"It has {listed(versions_of(session, name, MAX_SHOWN + 1))}; promote another by its id."
        )
    # After a version was removed, the promotions before and after it may be of the same version.
    for promotion in _standing_promotions(session, name):
        if promotion.id == previous.id:
            break
        promotion.taken_back = True
    name_row.promoted = versioned(name, previous.version)
    return session.get_one(ModelRow, name_row.promoted)


def forget(session: Session, name: str, versions: Iterable[int]) -> None:
    """Take back every promotion of versions that were removed; the name then means the one promoted before."""
    removed_versions = list(versions)
    promotions = select(PromotionRow).where(PromotionRow.name == name, PromotionRow.version.in_(removed_versions))
    for promotion in session.scalars(promotions):
        promotion.taken_back = True
    session.flush()
    name_row = session.get_one(NameRow, name)
    if name_row.promoted is not None and split_version(name_row.promoted)[1] in removed_versions:
        remaining = next(iter(_standing_promotions(session, name)), None)
        name_row.promoted = versioned(name, remaining.version) if remaining else None


def history(session: Session, name: str) -> list[PromotionRow]:
    """All promotions of a name, newest first."""
    return list(session.scalars(select(PromotionRow).where(PromotionRow.name == name).order_by(PromotionRow.id.desc())))


def listed(words: Iterable[object]) -> str:
    """The first `MAX_SHOWN` words, with `and more` if there are more."""
    texts = [str(word) for word in words]
    return ", ".join(texts[:MAX_SHOWN]) + (", and more" if len(texts) > MAX_SHOWN else "")


def _standing_promotions(session: Session, name: str) -> list[PromotionRow]:
    return [promotion for promotion in history(session, name) if not promotion.taken_back]
