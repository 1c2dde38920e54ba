"""
Who ran this executable, on which hosts, since when? Answered by DuckDB, from the stream in JetStream.

    who_ran.py --server nats://10.0.0.1:4222 --db fleet.duckdb /usr/bin/curl

Each run takes what is new into the database file and then asks it. A durable consumer of the stream knows how far we
are; a message that comes again, because we were ended before we said that we have it, is known by its id.
"""

import argparse
import asyncio
import json
import sys
from typing import Any

import duckdb
import nats
from nats.aio.msg import Msg
from nats.js.api import AckPolicy, ConsumerConfig

TABLE = """
CREATE TABLE IF NOT EXISTS execs (
    message VARCHAR PRIMARY KEY, time TIMESTAMP, host VARCHAR, id VARCHAR, exe VARCHAR, argv VARCHAR[],
    account VARCHAR, container VARCHAR, parent VARCHAR
)
"""
# One round trip for a batch: DuckDB is quick with columns and slow with single rows.
INSERT = "INSERT OR IGNORE INTO execs SELECT " + ", ".join(f"unnest(${at})" for at in range(1, 10))
QUESTION = """
SELECT host, coalesce(account, '?') AS account, count(*) AS times, min(time) AS since, max(time) AS last,
       arg_max(parent, time) AS last_parent
FROM execs WHERE exe = $1 GROUP BY ALL ORDER BY since
"""
BATCH = 1000


def row(message: Msg) -> tuple[Any, ...]:
    """
    What is kept of an exec.
    """
    event = json.loads(message.data)
    return (
        (message.headers or {})["Nats-Msg-Id"],
        event["time"].rstrip("Z"),
        event["host"],
        event["id"],
        event["exe"],
        event["argv"],
        event["user"],
        (event["container"] or {}).get("name"),
        (event["parent"] or {}).get("exe"),
    )


async def take_new(server: str, database: Any) -> int:
    """
    From the stream into the database; returns how many messages.
    """
    client = await nats.connect(server)
    taken = 0
    try:
        config = ConsumerConfig(ack_policy=AckPolicy.EXPLICIT, max_ack_pending=2 * BATCH)
        consumer = await client.jetstream().pull_subscribe("procwatch.*.exec", durable="duckdb", config=config)
        new = (await consumer.consumer_info()).num_pending or 0  # what comes meanwhile is for the next run
        while taken < new:
            messages = await consumer.fetch(min(BATCH, new - taken), timeout=5)
            database.execute(INSERT, [list(column) for column in zip(*map(row, messages), strict=True)])
            for message in messages:  # in the database: not before
                await message.ack()
            taken += len(messages)
        await client.flush()
    finally:
        await client.close()
    return taken


def main() -> int:
    """
    Take what is new, then answer.
    """
    parser = argparse.ArgumentParser(description="Who ran this executable, on which hosts, since when?")
    parser.add_argument("exe", help="full path of the executable")
    parser.add_argument("--server", default="nats://localhost:4222")
    parser.add_argument("--db", default="fleet.duckdb")
    options = parser.parse_args()
    with duckdb.connect(options.db) as database:
        database.execute(TABLE)
        taken = asyncio.run(take_new(options.server, database))
        print(f"{taken} new execs", file=sys.stderr)
        answer = database.execute(QUESTION, [options.exe]).fetchall()
    for host, account, times, since, last, parent in answer:
        print(f"{host}: {account} {times} times since {since}, last {last}, by {parent}")
    return 0 if answer else 1


if __name__ == "__main__":
    sys.exit(main())
