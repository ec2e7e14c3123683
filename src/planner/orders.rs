//! In which orders ranks can stand in the pipeline. Ranks of one kind are interchangeable and keep rank
//! order, so what matters is how many of each kind have been used.

/// The orders, as steps from one state to the next: a state is what ranks have been used so far.
pub struct Orders {
    /// The kind of each rank.
    kinds: Vec<usize>,
    /// By state: the kinds that can come next and the states that they lead to, which are larger.
    pub next: Vec<Vec<(usize, usize)>>,
    /// By state: how many ranks have been used.
    pub used: Vec<usize>,
}

impl Orders {
    /// All orders, from the kind of each rank; kinds are numbered from 0. None where there are more than
    /// `most` states.
    pub fn all(kinds: &[usize], most: usize) -> Option<Orders> {
        let mut counts = vec![0; kinds.iter().max().map_or(0, |last| last + 1)];
        kinds.iter().for_each(|&kind| counts[kind] += 1);
        let mut states = 1usize;
        let mut weights = Vec::new();
        for count in &counts {
            weights.push(states);
            states = states.checked_mul(count + 1).filter(|&states| states <= most)?;
        }
        let digit = |state: usize, kind: usize| state / weights[kind] % (counts[kind] + 1);
        let every = 0..counts.len();
        let steps = |state| {
            let free = every.clone().filter(|&kind| digit(state, kind) < counts[kind]);
            free.map(|kind| (kind, state + weights[kind])).collect()
        };
        Some(Orders {
            kinds: kinds.to_vec(),
            next: (0..states).map(steps).collect(),
            used: (0..states).map(|state| every.clone().map(|kind| digit(state, kind)).sum()).collect(),
        })
    }

    /// Rank order and no other.
    pub fn by_rank(kinds: &[usize]) -> Orders {
        let steps = kinds.iter().enumerate().map(|(rank, &kind)| vec![(kind, rank + 1)]);
        Orders {
            kinds: kinds.to_vec(),
            next: steps.chain([vec![]]).collect(),
            used: (0..=kinds.len()).collect(),
        }
    }

    /// Ranks in all.
    pub fn ranks(&self) -> usize {
        self.kinds.len()
    }

    /// The ranks that stand for a sequence of kinds: those of one kind in rank order.
    pub fn ranks_of(&self, sequence: impl IntoIterator<Item = usize>) -> Vec<usize> {
        let mut from = vec![0; self.kinds.len()];
        let ranks = sequence.into_iter().map(|kind| {
            let rank = (from[kind]..self.kinds.len()).find(|&rank| self.kinds[rank] == kind);
            let rank = rank.expect("a kind comes as often as it has ranks");
            from[kind] = rank + 1;
            rank
        });
        ranks.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(orders: &Orders, state: usize) -> usize {
        match &orders.next[state][..] {
            [] => 1,
            steps => steps.iter().map(|&(_, next)| count(orders, next)).sum(),
        }
    }

    #[test]
    fn interchangeable_ranks_are_counted_and_not_permuted() {
        let orders = Orders::all(&[0, 1, 0, 0], 100).unwrap();
        assert_eq!(orders.next.len(), 4 * 2);
        assert_eq!(count(&orders, 0), 4, "the odd one can stand in four places");
        assert_eq!(count(&Orders::all(&[0, 1, 2], 100).unwrap(), 0), 6);
        assert_eq!(count(&Orders::by_rank(&[0, 1, 0, 0]), 0), 1);
        assert!(Orders::all(&[0, 1, 2, 3], 15).is_none());
    }

    #[test]
    fn equal_ranks_keep_rank_order() {
        let orders = Orders::all(&[0, 1, 0, 0], 100).unwrap();
        assert_eq!(orders.ranks_of([0, 0, 1, 0]), [0, 2, 1, 3]);
    }
}
