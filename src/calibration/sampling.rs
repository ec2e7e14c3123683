//! Which tokens choose, and which judge.

/// One document in this many is held out.
const SHARE: usize = 16;

/// Fewer documents than this are too few to hold one out.
const FEWEST: usize = 8;

/// The roles of calibration tokens, which follow from the documents' lengths alone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sampling {
    /// Whether each document is held out.
    pub held_out: Vec<bool>,
    /// Tokens that are sampled to choose with, ascending, counted over all documents.
    pub fit: Vec<usize>,
    /// Tokens that are sampled to judge with, ascending, all in held-out documents.
    pub judge: Vec<usize>,
    /// Tokens of documents that are not held out.
    pub fit_tokens: usize,
}

impl Sampling {
    /// Rows that are kept whole at each site at most, for choosing and again for judging.
    pub const ROWS: usize = 512;

    /// Spreads samples evenly over the documents; the last of every sixteen is held out where `hold_out`.
    pub fn of(lengths: &[usize], hold_out: bool) -> Sampling {
        let documents = lengths.len();
        let held = |i: usize| i % SHARE == SHARE - 1 || (documents < SHARE && i + 1 == documents);
        let held_out: Vec<bool> =
            (0..documents).map(|i| hold_out && documents >= FEWEST && held(i)).collect();
        let tokens = |role: bool| {
            let mut start = 0;
            let mut tokens = Vec::new();
            for (&length, &held) in lengths.iter().zip(&held_out) {
                if held == role {
                    tokens.extend(start..start + length);
                }
                start += length;
            }
            tokens
        };
        let (fit, judge) = (tokens(false), tokens(true));
        Sampling { fit_tokens: fit.len(), fit: spread(&fit), judge: spread(&judge), held_out }
    }
}

/// At most [`Sampling::ROWS`] of `tokens`, at even distances.
fn spread(tokens: &[usize]) -> Vec<usize> {
    let rows = tokens.len().min(Sampling::ROWS);
    (0..rows).map(|i| tokens[(2 * i + 1) * tokens.len() / (2 * rows)]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn judges_are_documents_that_no_choice_sees() {
        let lengths: Vec<usize> = (0..40).map(|i| 100 + i).collect();
        let sampling = Sampling::of(&lengths, true);
        let held: Vec<usize> = (0..40).filter(|&i| sampling.held_out[i]).collect();
        assert_eq!(held, [15, 31]);
        let document = |token: usize| {
            let mut end = 0;
            lengths.iter().position(|length| (end += length, token < end).1).unwrap()
        };
        assert_eq!(sampling.fit.len(), 512);
        assert!(sampling.fit.iter().all(|&token| !held.contains(&document(token))));
        assert!(sampling.judge.iter().all(|&token| held.contains(&document(token))));
        assert_eq!(sampling.fit_tokens + 115 + 131, lengths.iter().sum::<usize>());
        assert!(sampling.fit.is_sorted() && sampling.judge.is_sorted());
    }

    #[test]
    fn few_documents_hold_out_the_last_and_very_few_none() {
        assert_eq!(Sampling::of(&[10; 9], true).held_out.iter().position(|&held| held), Some(8));
        assert!(Sampling::of(&[10; 7], true).judge.is_empty());
        assert!(Sampling::of(&[10; 40], false).judge.is_empty());
        assert_eq!(Sampling::of(&[3, 2], false).fit, [0, 1, 2, 3, 4]);
    }
}
