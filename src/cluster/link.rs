//! How fast ranks exchange messages, measured briefly.

use std::time::Instant;

use super::{Cluster, Frame, Tag};
use crate::error::Result;

/// Bytes of one exchange.
const BYTES: usize = 4 << 20;

/// Exchanges with one partner; the fastest counts.
const TIMES: usize = 3;

impl Cluster {
    /// Bytes/s at which this rank exchanges large messages, in both directions at once, the best over partners
    /// at distances 1, 2, 4, …: so two ranks exchange at about the lower of their rates. Hosts are measured
    /// against each other, by their first ranks; where all ranks share one host, its first two. All ranks take
    /// part; alone, there is no limit.
    ///
    /// # Errors
    /// Exit code 5 where ranks do not understand each other.
    pub fn link_rate(&self) -> Result<f64> {
        let firsts: Vec<usize> = (0..self.size).filter(|&rank| self.hosts[rank] == rank).collect();
        let partners = if firsts.len() > 1 { firsts } else { (0..self.size.min(2)).collect() };
        let mine = partners.iter().position(|&rank| rank == self.rank);
        let rate = mine.map_or(0.0, |mine| self.best_of(&partners, mine));
        let rates = self.all_gather(&rate)?;
        let best = self.local_ranks().iter().map(|&rank| rates[rank]).fold(0.0, f64::max);
        Ok(if best > 0.0 { best } else { f64::MAX })
    }

    fn best_of(&self, partners: &[usize], mine: usize) -> f64 {
        let (n, mut best, mut distance) = (partners.len(), 0.0f64, 1);
        while distance < n {
            let (to, from) = (partners[(mine + distance) % n], partners[(mine + n - distance) % n]);
            // The first opens the connection.
            self.exchange(to, from, 1);
            for _ in 0..TIMES {
                best = best.max(BYTES as f64 / self.exchange(to, from, BYTES));
            }
            distance *= 2;
        }
        best
    }

    /// Seconds until a message to one partner and one from another have passed.
    fn exchange(&self, to: usize, from: usize, bytes: usize) -> f64 {
        let transport = self.transport.as_ref().expect("a job of one rank has no partners");
        let body = vec![0; bytes];
        let started = Instant::now();
        transport.send(to, Tag::Collective, Frame { head: vec![], body });
        let mut received = false;
        while transport.progress() > 0 || !received {
            received = received || transport.poll_from(from, Tag::Collective).is_some();
            if let Err(error) = self.stay_alive() {
                self.end(error);
            }
        }
        started.elapsed().as_secs_f64()
    }
}
