from experiments.laboratory.terms import intervals


def test_what_is_repeated_in_the_resamples_is_said() -> None:
    assert intervals(5) == {"Intervals": "95% bootstrap over 5 seeds, widened where they are few."}
    assert intervals(2, "tuning is repeated")["Intervals"].endswith("that is compared, and tuning is repeated in each.")
