"""The forms of contributions that layer rules share, by what an example's contribution is made of.

    Dense, PositionSum        nothing but itself
    Outer, OuterSum           outer products d_bt a_bt^T, of one position or several
    Rows                      few rows of a table
    ConvolutionWeight         a convolution of the input with the output's gradient
    Products                  outer products of three factors
    Streamed, Groups          whatever gives one example at a time

Those that belong to one rule are beside it.
"""
