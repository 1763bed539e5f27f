"""The dimension legend: what the capitals at the end of an array's name mean.

`x_BTD` is an array of shape [B, T, D]. A capital is a logical dimension; the same letter in
lower case is that dimension divided: per block of 128 (`sx_BTd`, scales) or per shard. A suffix
never says how an array is sharded. A leading digit-free name without suffix is a scalar.

| letter | dimension                              | letter | dimension                           |
|--------|----------------------------------------|--------|-------------------------------------|
| B      | sequences in a batch                   | E      | routed experts                      |
| T      | query positions (tokens of a sequence) | K      | experts chosen for a token          |
| S      | key positions                          | G      | expert groups (nodes, in training)  |
| D      | model width                            | M      | expert hidden width                 |
| N      | attention heads                        | X      | tokens of a batch, B·T flattened    |
| H      | head dim without position (nope)       | A      | assignments, X·K                    |
| R      | head dim with position (rope)          | P      | rows after padding experts to blocks|
| U      | value head dim                         | Z      | blocks of rows, P / block           |
| Q      | query latent                           | L      | layers                              |
| C      | key-value latent                       | J      | MTP depths                          |
| F      | dense hidden width                     | V      | vocabulary                          |
| W      | width of a query or key, H + R         | I, O   | inputs, outputs of any linear map   |
"""
