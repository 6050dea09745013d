"""Put an optimiser from elsewhere into the comparison, beside the package's own.

    python examples/own_optimiser.py

Any Optax transformation that is made from one number can take part. It is tuned, trained and
counted like every other. ``gnlin report gnlin-results/own`` turns the runs into a page.
"""

import optax

from gnlin.compare import optax_contestant, run

WORK = 0.05  # of the task's budget, to be quick

if __name__ == "__main__":
    lion = optax_contestant("lion", optax.lion, grid=(1e-4, 4e-4, 1.6e-3, 6.4e-3, 2.56e-2))
    runs = run("digits", ["adam", lion], seeds=1, work=WORK, out="gnlin-results/own")
    for row in runs:
        (rate,) = row["setting"].values()
        if row["status"] != "finished":  # it diverged, or a mistake in it is the reason
            print(f"{row['label']:14} {rate:<8g} {row['status']}: {row['reason']}")
            continue
        last = {name: values[-1] for name, values in row["curve"].items()}
        print(f"{row['label']:14} {rate:<8g} loss {last['loss']:.1e}", end="  ")
        print(f"held out {last['quality']:.1f} %")
