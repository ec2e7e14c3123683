//! The first thing that ranks tell each other: who they are, and whether they belong together.

use std::fs;

use serde::{Deserialize, Serialize};

use super::Cluster;
use super::host::cores::Cores;
use crate::error::{Error, Result};

/// What a rank says of itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Greeting {
    /// The host's name.
    pub(super) host: String,
    /// What tells two hosts of the same name apart: drawn anew whenever a kernel starts.
    boot: String,
    /// distq's version. Builds for different machines differ in every byte, so the program itself is not compared.
    version: String,
    /// The MPI library's name and version, where there is any.
    library: Option<String>,
    /// The cores that it may use.
    pub(super) cores: Cores,
}

impl Greeting {
    pub(super) fn of(cluster: &Cluster, cores: Cores) -> Greeting {
        Greeting {
            host: cluster.host.clone(),
            boot: fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default(),
            version: env!("CARGO_PKG_VERSION").to_string(),
            library: cluster.library(),
            cores,
        }
    }

    /// Whether both ranks share a host's cores, memory and devices.
    fn is_near(&self, other: &Greeting) -> bool {
        (&self.host, &self.boot) == (&other.host, &other.boot)
    }

    /// Whether this rank's program and MPI can work with rank 0's.
    pub(super) fn fits(&self, root: &Greeting) -> Result<()> {
        if self.version != root.version {
            let (mine, theirs) = (&self.version, &root.version);
            return Err(Error::run(format!("this is distq {mine}, rank 0 on {} is {theirs}", root.host))
                .fix("install the same version on every host"));
        }
        if self.library != root.library {
            let name = |greeting: &Greeting| greeting.library.clone().unwrap_or_default();
            let (mine, theirs) = (name(self), name(root));
            return Err(Error::run(format!(
                "this rank's MPI is {mine}, rank 0's on {} is {theirs}",
                root.host
            ))
            .fix("install the same MPI on every host: different ones lose messages without a word"));
        }
        Ok(())
    }
}

/// Every rank's host, as a number that no other host has: the first rank on it. Names are for people, since two hosts may
/// have the same one.
pub(super) fn hosts(greetings: &[Greeting]) -> Vec<usize> {
    let first = |one: &Greeting| greetings.iter().position(|other| other.is_near(one));
    greetings.iter().map(|one| first(one).expect("a rank is near itself")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn greeting() -> Greeting {
        let text = |text: &str| text.to_string();
        Greeting {
            host: text("a"),
            boot: text("1"),
            version: text("1.0.0"),
            library: Some(text("Open MPI v4.1.4")),
            cores: Cores::default(),
        }
    }

    #[test]
    fn other_versions_and_other_libraries_are_refused_with_both_names() {
        let root = greeting();
        assert!(greeting().fits(&root).is_ok());
        let newer = Greeting { version: "2.0.0".into(), ..greeting() };
        let said = newer.fits(&root).unwrap_err().to_string();
        assert!(said.contains("2.0.0") && said.contains("1.0.0"), "{said}");
        let other = Greeting { library: Some("MPICH 5".into()), ..greeting() };
        let said = other.fits(&root).unwrap_err().to_string();
        assert!(said.contains("MPICH 5") && said.contains("v4.1.4"), "{said}");
    }

    #[test]
    fn hosts_of_one_name_are_told_apart() {
        let restarted = Greeting { boot: "2".into(), ..greeting() };
        let named = Greeting { host: "b".into(), ..greeting() };
        assert_eq!(hosts(&[greeting(), restarted.clone(), greeting(), named, restarted]), [0, 1, 0, 3, 1]);
    }
}
