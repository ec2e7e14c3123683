//! Exchanges in which every rank takes part, over a binomial tree rooted at rank 0.

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{Cluster, Frame, Tag};
use crate::error::{Error, ExitCode, Result};

impl Cluster {
    /// Every rank's value, in rank order, on every rank.
    pub fn all_gather<T: Serialize + DeserializeOwned>(&self, mine: &T) -> Result<Vec<T>> {
        let gathered = self.gather(mine)?;
        self.broadcast(gathered)
    }

    /// Every rank's value, in rank order, on rank 0.
    pub fn gather<T: Serialize + DeserializeOwned>(&self, mine: &T) -> Result<Option<Vec<T>>> {
        let mut collected = vec![(self.rank, to_json(mine))];
        for child in self.children() {
            let frame = self.receive_from(child);
            collected.extend(from_json::<Vec<(usize, Vec<u8>)>>(&frame.body)?);
        }
        if !self.is_root() {
            self.deliver(self.parent(), Frame { head: vec![], body: to_json(&collected) });
            return Ok(None);
        }
        collected.sort_by_key(|(rank, _)| *rank);
        collected.iter().map(|(_, value)| from_json(value)).collect::<Result<Vec<T>>>().map(Some)
    }

    /// Rank 0's value, on every rank. Other ranks pass `None`.
    pub fn broadcast<T: Serialize + DeserializeOwned>(&self, mine: Option<T>) -> Result<T> {
        match mine {
            Some(value) => {
                if self.size > 1 {
                    self.broadcast_bytes(Some(to_json(&value)));
                }
                Ok(value)
            }
            None => from_json(&self.broadcast_bytes(None)),
        }
    }

    /// Rank 0's bytes, on every rank.
    pub fn broadcast_bytes(&self, mine: Option<Vec<u8>>) -> Vec<u8> {
        let body = match mine {
            Some(body) => body,
            None => self.receive_from(self.parent()).body,
        };
        for child in self.children() {
            self.deliver(child, Frame { head: vec![], body: body.clone() });
        }
        body
    }

    /// Waits until every rank is here.
    pub fn barrier(&self) -> Result<()> {
        self.all_gather(&()).map(|_| ())
    }

    /// Every rank passes its own result; if any failed, all fail with the error of the lowest such rank.
    pub fn agree<T>(&self, mine: Result<T>) -> Result<T> {
        let fault = mine.as_ref().err().map(|error| (error.exit as i32, self.place(&error.to_string())));
        let faults = self.all_gather(&fault)?;
        match faults.into_iter().flatten().next() {
            None => mine,
            Some((code, text)) => {
                self.agreed.set(true);
                Err(Error::reported(ExitCode::from_number(code), text))
            }
        }
    }

    /// Rank 0 computes, for as long as it takes; every rank gets the value or the error.
    pub fn from_root<T: Serialize + DeserializeOwned + Send>(
        &self,
        compute: impl FnOnce() -> Result<T> + Send,
    ) -> Result<T> {
        let mine = if self.is_root() { self.attend(compute).map(Some) } else { Ok(None) };
        self.agree(mine).and_then(|value| self.broadcast(value))
    }

    /// Every rank that this one hears of regularly: rank 0, or on rank 0 all, and its neighbours in the tree.
    pub(super) fn company(&self) -> Vec<usize> {
        if self.is_root() {
            (1..self.size).collect()
        } else {
            [vec![0, self.parent()], self.children()].concat()
        }
    }

    fn parent(&self) -> usize {
        self.rank & (self.rank - 1)
    }

    /// The ranks below this one in the tree, nearest last: rank r's children are r + 2^i for every 2^i below
    /// r's lowest set bit.
    fn children(&self) -> Vec<usize> {
        let lowest =
            if self.rank == 0 { self.size.next_power_of_two() } else { self.rank & self.rank.wrapping_neg() };
        let mut step = lowest >> 1;
        let mut children = vec![];
        while step > 0 {
            if self.rank + step < self.size {
                children.push(self.rank + step);
            }
            step >>= 1;
        }
        children
    }

    fn deliver(&self, peer: usize, frame: Frame) {
        let Some(transport) = &self.transport else { return };
        transport.send(peer, Tag::Collective, frame);
        self.wait_until(|| (transport.progress() == 0).then_some(()));
    }

    fn receive_from(&self, peer: usize) -> Frame {
        let transport = self.transport.as_ref().expect("a job of one rank has no peers");
        self.wait_until(|| transport.poll_from(peer, Tag::Collective))
    }
}

fn to_json<T: Serialize>(value: &T) -> Vec<u8> {
    serde_json::to_vec(value).expect("exchanged values are plain data")
}

fn from_json<T: DeserializeOwned>(bytes: &[u8]) -> Result<T> {
    serde_json::from_slice(bytes).map_err(|e| {
        Error::run(format!("another rank sent something unreadable: {e}"))
            .fix("run the same build of distq on every host")
    })
}
