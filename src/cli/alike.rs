//! Whether all ranks were started alike. Every option of the command line is compared as it was typed, so that an option
//! that is added is compared too; the exceptions are listed here.

use clap::{Arg, ArgAction, ArgMatches, Command};
use serde::{Deserialize, Serialize};

use distq::cluster::Cluster;
use distq::error::{Error, Result};

/// Arguments whose values are each rank's own: where its host has the checkpoint, what it computes on, where it keeps
/// hidden states, what it prints. How many values there are is compared all the same.
const OWN: [&str; 7] = ["model", "models", "reference", "device", "work_dir", "verbose", "quiet"];

/// A command line as it was typed, with the default values of what was not.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub struct Typed {
    command: String,
    arguments: Vec<Argument>,
}

/// One argument of a command line.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Argument {
    /// Its name as in the help: `--seed`, or `OUT`.
    name: String,
    /// What this rank was given, as one would type it; empty where it was not given.
    typed: String,
}

impl Typed {
    /// Reads what `command` made of a command line. The command is one that has been built.
    pub fn new(command: &Command, matches: &ArgMatches) -> Typed {
        let (name, matches) = matches.subcommand().expect("clap demands a subcommand");
        let subcommand = command.find_subcommand(name).expect("clap found it");
        let arguments = subcommand.get_arguments().map(|argument| Argument::new(argument, matches)).collect();
        Typed { command: name.to_string(), arguments }
    }

    /// Fails on all ranks where one was started in another way than rank 0.
    ///
    /// # Errors
    /// Exit code 2, naming all options that differ with the values of both ranks.
    pub fn agree(self, cluster: &Cluster) -> Result<()> {
        let all = cluster.all_gather(&self)?;
        cluster.agree(self.like(&all[0]))
    }

    fn like(&self, root: &Typed) -> Result<()> {
        let (mine, theirs) = if self.command != root.command {
            (format!("as distq {}", self.command), format!("as distq {}", root.command))
        } else {
            let differ = self.arguments.iter().zip(&root.arguments).filter(|(mine, theirs)| mine != theirs);
            let (mine, theirs): (Vec<String>, Vec<String>) =
                differ.map(|(mine, theirs)| (mine.said(), theirs.said())).unzip();
            if mine.is_empty() {
                return Ok(());
            }
            (mine.join(" and "), theirs.join(" and "))
        };
        Err(Error::usage(format!("this rank was started {mine}, rank 0 {theirs}")).fix(
            "give every rank the same command and options: only MODEL, --device, -v, -q and the path after --work-dir \
             may differ",
        ))
    }
}

impl Argument {
    fn new(argument: &Arg, matches: &ArgMatches) -> Argument {
        let id = argument.get_id().as_str();
        let placeholder =
            || argument.get_value_names().map_or(id.to_uppercase(), |names| names[0].to_string());
        let name = argument.get_long().map_or_else(placeholder, |long| format!("--{long}"));
        let values = matches.try_get_raw(id).ok().flatten().into_iter().flatten();
        let values: Vec<String> = values
            .map(|value| if OWN.contains(&id) { String::new() } else { quoted(&value.to_string_lossy()) })
            .collect();
        let typed = match argument.get_action() {
            ArgAction::SetTrue if values == ["true"] => name.clone(),
            ArgAction::SetTrue => String::new(),
            _ if values.is_empty() => String::new(),
            _ => match argument.get_value_delimiter() {
                Some(delimiter) => format!("{name} {}", values.join(&delimiter.to_string())),
                None => values.iter().map(|value| format!("{name} {value}")).collect::<Vec<_>>().join(" "),
            },
        };
        Argument { name, typed }
    }

    fn said(&self) -> String {
        match self.typed.trim_end() {
            "" => format!("without {}", self.name),
            typed => format!("with {typed}"),
        }
    }
}

/// As a shell takes it.
fn quoted(value: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:,=+@%".contains(c);
    match !value.is_empty() && value.chars().all(plain) {
        true => value.to_string(),
        false => format!("'{}'", value.replace('\'', r"'\''")),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::cli::Cli;

    fn typed(line: &str) -> Typed {
        let mut command = Cli::command();
        command.build();
        let matches = command.try_get_matches_from_mut(line.split_whitespace()).unwrap();
        Typed::new(&command, &matches)
    }

    #[test]
    fn every_option_must_be_the_same_and_is_named_with_both_values() {
        let root = "distq quantize m o";
        for (option, mine, theirs) in [
            ("--seed 5", "with --seed 5", "with --seed 0"),
            ("--calib a.jsonl", "with --calib a.jsonl", "with --calib builtin"),
            ("--calib-samples 8", "with --calib-samples 8", "with --calib-samples 256"),
            ("--max-shard-size 70KB", "with --max-shard-size 70KB", "with --max-shard-size 5GB"),
            ("--gather", "with --gather", "without --gather"),
            ("--resume", "with --resume", "without --resume"),
            ("--report r", "with --report r", "without --report"),
            ("--ignore a --ignore b*", "with --ignore a --ignore 'b*'", "without --ignore"),
            ("--layers-per-rank 1,2", "with --layers-per-rank 1,2", "without --layers-per-rank"),
            ("--memory-per-rank 1GiB,2GiB", "with --memory-per-rank 1GiB,2GiB", "without --memory-per-rank"),
            ("--link-timeout 9", "with --link-timeout 9", "with --link-timeout 120"),
            ("--work-dir /w", "with --work-dir", "without --work-dir"),
        ] {
            let said = typed(&format!("{root} {option}")).like(&typed(root)).unwrap_err().to_string();
            assert!(said.starts_with(&format!("this rank was started {mine}, rank 0 {theirs};")), "{said}");
        }
        let said = typed("distq quantize m elsewhere").like(&typed(root)).unwrap_err().to_string();
        assert!(said.contains("with OUT elsewhere, rank 0 with OUT o;"), "{said}");
        let said = typed("distq plan m").like(&typed(root)).unwrap_err().to_string();
        assert!(said.contains("as distq plan, rank 0 as distq quantize;"), "{said}");
        let said = typed("distq eval a b --text t").like(&typed("distq eval a --text t")).unwrap_err();
        assert!(said.to_string().contains("MODELS"), "{said}");
    }

    #[test]
    fn what_is_a_rank_s_own_may_differ() {
        for (mine, root) in [
            ("quantize -v /a/m o --device cpu --work-dir /a", "quantize /b/m o --work-dir /b -q"),
            ("quantize m o --seed 0", "quantize m o"),
            ("eval a b --text t --reference /a/r", "eval c d --text t --reference /b/r"),
        ] {
            typed(&format!("distq {mine}")).like(&typed(&format!("distq {root}"))).unwrap();
        }
    }
}
