import pytest

from sqakd_hf._text import reason, suggest
from sqakd_hf._validation import check_bits
from sqakd_hf.errors import InputError


class TestInputError:
    def test_is_a_value_error(self):
        # Callers that know nothing of this package catch it by the standard type.
        assert issubclass(InputError, ValueError)


class TestCheckBits:
    def test_returns_every_width_from_one_to_eight(self):
        assert [check_bits(bits) for bits in range(1, 9)] == [1, 2, 3, 4, 5, 6, 7, 8]

    @pytest.mark.parametrize("bits", [0, 9, -1, 2.5, 4.0, "four", "4", True, False, None])
    def test_says_what_was_given_what_is_accepted_and_what_to_do(self, bits):
        with pytest.raises(InputError) as error:
            check_bits(bits)

        assert str(error.value) == (
            f"bits must be an integer from 1 to 8, got {bits!r}. "
            "To keep a layer in full precision add it to modules_to_not_convert."
        )

    def test_names_the_field(self):
        with pytest.raises(InputError, match=r"^weight_bits must be an integer from 1 to 8, got 0\."):
            check_bits(0, "weight_bits")


class TestSuggest:
    def test_names_the_one_close_name(self):
        assert suggest("dorefaa", ["dorefa", "ewgs", "lsq"]) == " Did you mean 'dorefa'?"

    def test_joins_several_close_names_best_first(self):
        assert suggest("lsqq", ["ewgs", "lsq+", "lsq"]) == " Did you mean 'lsq' or 'lsq+'?"

    def test_says_nothing_where_nothing_is_close(self):
        assert suggest("zebra", ["dorefa", "ewgs", "lsq"]) == ""

    def test_takes_any_object_and_any_iterable(self):
        assert suggest(None, iter(["none", "ewgs"])) == " Did you mean 'none'?"


class TestReason:
    def test_it_is_the_cause_on_one_line(self):
        error = ValueError("outer")
        assert reason(error) == "outer"
        error.__cause__ = OSError("a\n  b.")
        assert reason(error) == "a b"

    def test_an_error_without_message_is_named(self):
        assert reason(EOFError()) == "EOFError"
