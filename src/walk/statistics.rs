//! Gathers the statistics of a layer's inputs while micro-batches pass it: sums of products, maxima, squares and
//! sampled rows.

use crate::backend::{Channels, Gathered, Solver};
use crate::error::Result;
use crate::job::Job;
use crate::methods::SiteStatistics;
use crate::model::{Layer, Site};

/// Which rows of one micro-batch are used for what. Rows are numbered inside the micro-batch.
struct Roles<I> {
    /// Rows of documents that are not held out, for the products; none where that is all rows.
    fit: Option<(I, usize)>,
    /// Sampled rows from which scales and codes are chosen.
    sample: Option<(I, usize)>,
    /// Sampled rows of held-out documents, on which choices are judged.
    judge: Option<(I, usize)>,
}

/// Gathers statistics with the backend, by the roles of all micro-batches' rows.
pub struct Gathering<'a, B: Solver> {
    backend: &'a B,
    products: bool,
    roles: Vec<Roles<B::Index>>,
    /// The number of sampled rows to choose with, and to judge with.
    sampled: [usize; 2],
}

/// The statistics of one layer by site, while they are being gathered.
pub struct LayerSums<B: Solver> {
    sites: Vec<B::Sums>,
}

impl<'a, B: Solver> Gathering<'a, B> {
    /// Finds the roles of every micro-batch's tokens.
    pub fn new(backend: &'a B, job: &Job) -> Result<Gathering<'a, B>> {
        let mut first = 0;
        let index = |rows: Vec<u32>| -> Result<Option<(B::Index, usize)>> {
            Ok(if rows.is_empty() { None } else { Some((backend.index(&rows)?, rows.len())) })
        };
        let mut roles = Vec::new();
        for batch in &job.micro_batches {
            let lengths = &job.lengths[batch.samples.clone()];
            let tokens: usize = lengths.iter().sum();
            let inside = |sampled: &[usize]| -> Vec<u32> {
                let rows = sampled.iter().filter(|&&token| (first..first + tokens).contains(&token));
                rows.map(|&token| (token - first) as u32).collect()
            };
            let held = &job.sampling.held_out[batch.samples.clone()];
            let fit: Vec<u32> = lengths
                .iter()
                .zip(held)
                .flat_map(|(&length, &held)| std::iter::repeat_n(!held, length))
                .zip(0..)
                .filter_map(|(fit, row)| fit.then_some(row))
                .collect();
            roles.push(Roles {
                fit: if fit.len() == tokens { None } else { Some((backend.index(&fit)?, fit.len())) },
                sample: index(inside(&job.sampling.fit))?,
                judge: index(inside(&job.sampling.judge))?,
            });
            first += tokens;
        }
        let sampled = [job.sampling.fit.len(), job.sampling.judge.len()];
        Ok(Gathering { backend, products: job.method.needs_products(), roles, sampled })
    }

    /// Empty statistics for one layer.
    pub fn layer(&self, layer: &Layer) -> Result<LayerSums<B>> {
        let sums = |site: &Site| self.backend.sums(site.features, self.products, self.sampled);
        Ok(LayerSums { sites: layer.sites.iter().map(sums).collect::<Result<_>>()? })
    }

    /// Adds the input `x`, `[tokens, cols]`, of a site for micro-batch `number`.
    pub fn take(
        &self,
        number: usize,
        site: usize,
        x: &B::Tensor,
        cols: usize,
        layer: &mut LayerSums<B>,
    ) -> Result<()> {
        let roles = &self.roles[number];
        let sums = &mut layer.sites[site];
        self.backend.add_channels(x, sums)?;
        if self.products {
            match &roles.fit {
                None => self.backend.add_products(x, sums)?,
                Some((_, 0)) => {}
                Some(rows) => self.backend.add_products(&self.rows(x, rows, cols)?, sums)?,
            }
        }
        for (role, rows) in [&roles.sample, &roles.judge].into_iter().enumerate() {
            if let Some((rows, _)) = rows {
                self.backend.add_rows(x, rows, role, sums)?;
            }
        }
        Ok(())
    }

    /// Reads the finished statistics of a layer.
    pub fn finish(&self, layer: LayerSums<B>) -> Result<Vec<SiteStatistics<B::Matrix>>> {
        let site = |sums: B::Sums| -> Result<SiteStatistics<B::Matrix>> {
            let Channels { amax, squares } = self.backend.read_channels(&sums)?;
            let Gathered { products, rows: [fit, judge] } = self.backend.gathered(sums)?;
            let held_out = (self.sampled[1] > 0).then_some(judge);
            Ok(SiteStatistics { products, fit, held_out, amax, squares })
        };
        layer.sites.into_iter().map(site).collect()
    }

    /// Some rows of `x`, in their order.
    fn rows(&self, x: &B::Tensor, (rows, count): &(B::Index, usize), cols: usize) -> Result<B::Tensor> {
        let mut out = self.backend.activation(*count, cols)?;
        self.backend.embed(x, rows, &mut out)?;
        Ok(out)
    }
}
