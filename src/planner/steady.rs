//! Rates without measurement noise.

use super::Node;

/// Rates that differ by less than this are those of equal machines.
const NOISE: f64 = 1.25;

/// Gives machines whose rates are alike their mean rate: equal machines measure a few percent apart, and the
/// plan should not show it.
pub fn steady(nodes: &[Node]) -> Vec<Node> {
    let mut nodes = nodes.to_vec();
    level(&mut nodes, |node| &mut node.flops);
    level(&mut nodes, |node| &mut node.statistics_flops);
    level(&mut nodes, |node| &mut node.solving_flops);
    level(&mut nodes, |node| &mut node.read_rate);
    level(&mut nodes, |node| &mut node.link);
    nodes
}

fn level(nodes: &mut [Node], rate: impl Fn(&mut Node) -> &mut f64) {
    let mut order: Vec<(f64, usize)> = nodes.iter_mut().map(|node| *rate(node)).zip(0..).collect();
    order.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    while let Some(&(fastest, _)) = order.first() {
        let alike = order.partition_point(|&(rate, _)| rate * NOISE > fastest).max(1);
        let mean = order[..alike].iter().map(|&(rate, _)| rate).sum::<f64>() / alike as f64;
        order.drain(..alike).for_each(|(_, index)| *rate(&mut nodes[index]) = mean);
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::node;
    use super::*;

    #[test]
    fn machines_that_measure_alike_count_as_equal() {
        let rates = [1.02e9, 5e9, 0.99e9, 0.99e9, 4.9e9];
        let nodes: Vec<Node> = rates.iter().map(|&rate| node(0, 0, rate)).collect();
        let level: Vec<f64> = steady(&nodes).iter().map(|node| node.flops).collect();
        assert_eq!(level, [1e9, 4.95e9, 1e9, 1e9, 4.95e9]);
    }
}
