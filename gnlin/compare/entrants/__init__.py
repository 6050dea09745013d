"""Who takes part, and how is it driven? `CONTESTANTS` names the optimisers.

In the order of their imports:

* `method`: an optimiser as two functions, ``init`` and ``step``;
* `contestant`: builds methods from options, and names the number that is tuned;
* `eigenbasis`: SOAP as an Optax transform;
* `optimisers` and `peers`: the methods of this package and Optax, and of other libraries;
* `requirements`: why a peer cannot take part;
* `contestants`: the table of all of them;
* `entry`: a contestant with its options fixed, from words of the command line.
"""
