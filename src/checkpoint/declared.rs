//! How a quantized checkpoint's configuration says that each linear is stored, by the matching rules of its loaders.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use aho_corasick::AhoCorasick;
use regex::bytes::{RegexSet, RegexSetBuilder};
use serde_json::{Map, Value};

use super::layout::Layout;

/// How the configuration says that a linear is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum LinearScheme {
    /// Not quantized.
    Plain,
    /// NVFP4.
    Nvfp4 {
        /// Whether inputs are quantized as well.
        activations: bool,
    },
    /// FP8, in a mixed checkpoint.
    Fp8,
}

/// What a configuration declares about the modules of its model. Every pattern is compiled once, and every module is
/// matched once.
#[derive(Debug, Default)]
pub struct Declared {
    schemes: HashMap<String, LinearScheme>,
    /// `ignore`, as it stands in config.json.
    pub ignore: Vec<String>,
    /// Patterns of `ignore` that match none of the modules.
    pub idle: Vec<String>,
    /// ModelOpt: patterns of `ignore`, each with the first module that has it as a part of its name only.
    pub accidental: Vec<(String, String)>,
    /// Modules beside the model's that `ignore` does not reach, where every linear is quantized that it does not reach.
    pub unreached: Vec<String>,
    /// Patterns that can't be used, with the reason.
    pub faults: Vec<String>,
}

/// The layout that config.json declares.
pub fn declared_layout(config: &Map<String, Value>) -> Option<Layout> {
    match config.get("quantization_config")?.get("quant_method")?.as_str()? {
        "compressed-tensors" => Some(Layout::CompressedTensors),
        "modelopt" => Some(Layout::Modelopt),
        _ => None,
    }
}

impl Declared {
    /// Reads `quantization_config` for these modules. Those `beside` them have no scheme: only whether `ignore` reaches
    /// them counts.
    pub fn of(
        layout: Option<Layout>,
        config: &Map<String, Value>,
        modules: &[String],
        beside: &[String],
    ) -> Declared {
        let Some(quantization) = config.get("quantization_config") else { return Declared::default() };
        let ignore = strings(&quantization["ignore"]);
        let targets = targets(layout, quantization);
        let names: Vec<String> = targets.iter().map(|(target, _)| target.clone()).collect();
        let mut faults = vec![];
        let ignored = Patterns::new(layout, &ignore, &mut faults);
        // Targets are full names, expressions or a class in both layouts.
        let targeted = Patterns::new(Some(Layout::CompressedTensors), &names, &mut faults);
        let class = targets.iter().find(|(target, _)| target == "Linear").map(|(_, scheme)| *scheme);
        let mut declared = Declared { faults, ..Declared::default() };
        let (mut used, mut parts) = (BTreeSet::new(), BTreeSet::new());
        for module in modules {
            let hits = ignored.matches(module);
            used.extend(hits.iter().map(|hit| hit.pattern));
            for hit in hits.iter().filter(|hit| hit.part && parts.insert(hit.pattern)) {
                declared.accidental.push((ignore[hit.pattern].clone(), module.clone()));
            }
            let scheme = if hits.is_empty() {
                // A module's own name wins over an expression, an expression over its class.
                let hits = targeted.matches(module);
                let best = hits.iter().min_by_key(|hit| (names[hit.pattern] != *module, hit.pattern));
                best.map(|hit| targets[hit.pattern].1).or(class).unwrap_or(LinearScheme::Plain)
            } else {
                LinearScheme::Plain
            };
            declared.schemes.insert(module.clone(), scheme);
        }
        for module in beside {
            let hits = ignored.matches(module);
            used.extend(hits.iter().map(|hit| hit.pattern));
            if hits.is_empty() && class.is_some_and(|scheme| scheme != LinearScheme::Plain) {
                declared.unreached.push(module.clone());
            }
        }
        let idle = ignore.iter().enumerate().filter(|(i, _)| !used.contains(i));
        declared.idle = idle.map(|(_, pattern)| pattern.clone()).collect();
        declared.ignore = ignore;
        declared
    }

    /// The scheme of a module; plain for one that was not asked about.
    pub fn of_module(&self, module: &str) -> LinearScheme {
        self.schemes.get(module).copied().unwrap_or(LinearScheme::Plain)
    }

    /// How many modules have each scheme, those that are not quantized left out.
    pub fn count(&self) -> BTreeMap<LinearScheme, usize> {
        let mut count = BTreeMap::new();
        for scheme in self.schemes.values().filter(|scheme| **scheme != LinearScheme::Plain) {
            *count.entry(*scheme).or_insert(0) += 1;
        }
        count
    }
}

/// Target patterns with their scheme, in the order in which they are tried.
fn targets(layout: Option<Layout>, quantization: &Value) -> Vec<(String, LinearScheme)> {
    if let Some(layers) = quantization["quantized_layers"].as_object() {
        // ModelOpt's mixed precision names every quantized module.
        let algorithm_of = |how: &Value| algorithm(how["quant_algo"].as_str().unwrap_or_default());
        return layers.iter().map(|(module, how)| (module.clone(), algorithm_of(how))).collect();
    }
    let mut targets = vec![];
    for group in quantization["config_groups"].as_object().into_iter().flat_map(Map::values) {
        let activations = group.get("input_activations").is_some_and(|args| !args.is_null());
        let scheme = match group["weights"]["num_bits"].as_u64() {
            Some(4) => LinearScheme::Nvfp4 { activations },
            Some(8) => LinearScheme::Fp8,
            _ => LinearScheme::Plain,
        };
        targets.extend(strings(&group["targets"]).into_iter().map(|target| (target, scheme)));
    }
    if layout == Some(Layout::Modelopt) && targets.is_empty() {
        targets.push(("Linear".into(), algorithm(quantization["quant_algo"].as_str().unwrap_or_default())));
    }
    targets
}

fn algorithm(name: &str) -> LinearScheme {
    match name {
        "NVFP4" => LinearScheme::Nvfp4 { activations: true },
        "W4A16_NVFP4" => LinearScheme::Nvfp4 { activations: false },
        "FP8" => LinearScheme::Fp8,
        _ => LinearScheme::Plain,
    }
}

/// A JSON array's strings.
pub fn strings(value: &Value) -> Vec<String> {
    value.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_string).collect()
}

/// A pattern that reaches a module.
struct Hit {
    /// Its place in the list.
    pattern: usize,
    /// Whether it is no more than a part of the module's name.
    part: bool,
}

/// A list of patterns, ready to be matched. compressed-tensors takes full names, and expressions behind `re:` that
/// match from the start; ModelOpt takes wildcards and any part of a name besides.
struct Patterns<'a> {
    texts: &'a [String],
    expressions: RegexSet,
    /// The place of each expression in the list.
    places: Vec<usize>,
    /// Places by full name.
    exact: HashMap<&'a str, Vec<usize>>,
    /// Places of patterns with `*` or `?`.
    wildcards: Vec<usize>,
    /// All names at once, where a part of a name counts, and their places.
    parts: Option<(AhoCorasick, Vec<usize>)>,
}

/// Bytes that the compiled expressions of a list may take together. The lists of published checkpoints stay far below.
const EXPRESSIONS: usize = 1 << 19;

/// Expressions and wildcards of a list, together. Each is tried on each module.
const MOST_PATTERNS: usize = 4096;

impl<'a> Patterns<'a> {
    fn new(layout: Option<Layout>, texts: &'a [String], faults: &mut Vec<String>) -> Patterns<'a> {
        let modelopt = layout == Some(Layout::Modelopt);
        let (mut sources, mut places, mut wildcards, mut names) = (vec![], vec![], vec![], vec![]);
        for (place, text) in texts.iter().enumerate() {
            match text.strip_prefix("re:") {
                Some(source) => {
                    sources.push(format!("^(?:{source})"));
                    places.push(place);
                }
                None if modelopt && text.contains(['*', '?']) => wildcards.push(place),
                None => names.push(place),
            }
        }
        if sources.len() + wildcards.len() > MOST_PATTERNS {
            faults.push(format!(
                "{} expressions and wildcards are more than the {MOST_PATTERNS} that distq tries on each module",
                sources.len() + wildcards.len()
            ));
            (sources, places, wildcards) = (vec![], vec![], vec![]);
        }
        let mut exact: HashMap<&str, Vec<usize>> = HashMap::new();
        for &place in &names {
            exact.entry(&texts[place]).or_default().push(place);
        }
        let parts = modelopt.then(|| {
            let places: Vec<usize> = names.iter().copied().filter(|&name| !texts[name].is_empty()).collect();
            AhoCorasick::new(places.iter().map(|&name| texts[name].as_str())).ok().map(|all| (all, places))
        });
        let expressions = expressions(&sources, faults);
        Patterns { texts, expressions, places, exact, wildcards, parts: parts.flatten() }
    }

    /// Every pattern that reaches the module.
    fn matches(&self, module: &str) -> Vec<Hit> {
        let whole = |pattern: usize| Hit { pattern, part: false };
        let exact = self.exact.get(module).into_iter().flatten();
        let wildcards = self.wildcards.iter().filter(|&&place| wildcard_matches(&self.texts[place], module));
        let mut hits: Vec<Hit> = exact.chain(wildcards).copied().map(whole).collect();
        if !self.places.is_empty() {
            let matched = self.expressions.matches(module.as_bytes());
            hits.extend(matched.into_iter().map(|i| whole(self.places[i])));
        }
        if let Some((all, places)) = &self.parts {
            let found = all.find_overlapping_iter(module).filter(|found| found.len() < module.len());
            hits.extend(found.map(|f| Hit { pattern: places[f.pattern().as_usize()], part: true }));
        }
        hits
    }
}

/// Compiles expressions into one set. What can't be used is said in `faults`, and matches nothing. Module names are
/// ASCII, so `\w` and `\d` are as well; it keeps them small.
fn expressions(sources: &[String], faults: &mut Vec<String>) -> RegexSet {
    let compile = |sources: &[&str]| {
        RegexSetBuilder::new(sources).unicode(false).size_limit(EXPRESSIONS).nest_limit(100).build()
    };
    let all: Vec<&str> = sources.iter().map(String::as_str).collect();
    if let Ok(set) = compile(&all) {
        return set;
    }
    const NOTHING: &str = r"[a&&b]";
    let usable = all.into_iter().map(|source| match compile(&[source]) {
        Ok(_) => source,
        Err(error) => {
            let why = match error {
                regex::Error::CompiledTooBig(_) => "is too large when it is compiled".to_string(),
                // The last line says what is wrong; those before it draw an arrow.
                error => format!("can't be used: {}", error.to_string().lines().last().unwrap_or_default()),
            };
            let written = source.trim_start_matches("^(?:").trim_end_matches(')');
            faults.push(format!("the expression {:?} {why}", shortened(written)));
            NOTHING
        }
    });
    let usable: Vec<&str> = usable.collect();
    compile(&usable).unwrap_or_else(|_| {
        faults.push(format!("{} expressions are too large together when they are compiled", sources.len()));
        compile(&vec![NOTHING; sources.len()]).unwrap_or_else(|_| RegexSet::empty())
    })
}

/// The beginning of a text, for messages.
fn shortened(text: &str) -> String {
    let short: String = text.chars().take(60).collect();
    if short.len() < text.len() { format!("{short} and so on") } else { short }
}

/// Whether `pattern`, in which `*` stands for any characters and `?` for one, is the whole text.
fn wildcard_matches(pattern: &str, text: &str) -> bool {
    let (pattern, text) = (pattern.as_bytes(), text.as_bytes());
    let (mut p, mut t) = (0, 0);
    // Behind the last `*`, and where its match in the text ends so far.
    let mut star = None;
    while t < text.len() {
        match pattern.get(p) {
            Some(b'*') => {
                p += 1;
                star = Some((p, t));
            }
            Some(b'?') => (p, t) = (p + 1, t + 1),
            Some(c) if *c == text[t] => (p, t) = (p + 1, t + 1),
            _ => match &mut star {
                None => return false,
                Some((behind, end)) => {
                    *end += 1;
                    (p, t) = (*behind, *end);
                }
            },
        }
    }
    pattern[p..].iter().all(|c| *c == b'*')
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use serde_json::json;

    use super::*;

    fn declared(layout: Layout, quantization: Value, modules: &[&str]) -> Declared {
        let config = json!({ "quantization_config": quantization });
        let modules: Vec<String> = modules.iter().map(|module| module.to_string()).collect();
        Declared::of(Some(layout), config.as_object().unwrap(), &modules, &[])
    }

    fn ignoring(layout: Layout, patterns: &[&str], modules: &[&str]) -> Declared {
        let groups =
            json!({"a": {"targets": ["Linear"], "weights": {"num_bits": 4}, "input_activations": {}}});
        declared(layout, json!({"ignore": patterns, "config_groups": groups}), modules)
    }

    /// Whether a pattern of `ignore` reaches a module.
    fn reaches(layout: Layout, pattern: &str, module: &str) -> bool {
        ignoring(layout, &[pattern], &[module]).of_module(module) == LinearScheme::Plain
    }

    const CT: Layout = Layout::CompressedTensors;
    const MO: Layout = Layout::Modelopt;
    const GATE: &str = "model.layers.10.mlp.gate_proj";

    #[test]
    fn patterns_reach_what_loaders_let_them_reach() {
        for (layout, pattern, expected) in [
            (CT, "re:.*gate_proj$", true),
            (CT, r"re:model\.layers\.\d+\.mlp", true), // from the start, not to the end
            (CT, "re:gate_proj", false),
            (CT, "gate", false),
            (CT, "*gate_proj", false), // only a full name there
            (CT, GATE, true),
            (MO, "gate", true),           // any part of a name counts
            (MO, "model.layers.1", true), // layer 1 reaches layer 10
            (MO, "model.layers.1.*", false),
            (MO, "model.layers.1?.*", true),
            (MO, "*gate_proj", true),
            (MO, "*.mlp.*_proj", true),
            (MO, "*gate", false),
            (MO, "", false),
        ] {
            assert_eq!(reaches(layout, pattern, GATE), expected, "{layout} {pattern:?}");
        }
    }

    #[test]
    fn wildcards_are_tried_at_every_place() {
        for (pattern, text, expected) in [
            ("a*b*c", "aXbXbXc", true),
            ("a*b*c", "aXbXbX", false),
            ("*", "", true),
            ("**", "x", true),
            ("?", "", false),
            ("*ab", "aab", true),
            ("a?c", "abc", true),
        ] {
            assert_eq!(wildcard_matches(pattern, text), expected, "{pattern} {text}");
        }
    }

    #[test]
    fn the_most_specific_target_wins() {
        let schemes = declared(
            CT,
            json!({"ignore": ["lm_head"], "config_groups": {
                "a": {"targets": ["Linear"], "weights": {"num_bits": 4}, "input_activations": null},
                "b": {"targets": ["re:.*o_proj$"], "weights": {"num_bits": 8}, "input_activations": {}},
                "c": {"targets": ["y.o_proj"], "weights": {"num_bits": 4}, "input_activations": {}},
            }}),
            &["x.q_proj", "x.o_proj", "y.o_proj", "lm_head"],
        );
        assert_eq!(schemes.of_module("x.q_proj"), LinearScheme::Nvfp4 { activations: false });
        assert_eq!(schemes.of_module("x.o_proj"), LinearScheme::Fp8);
        assert_eq!(schemes.of_module("y.o_proj"), LinearScheme::Nvfp4 { activations: true });
        assert_eq!(schemes.of_module("lm_head"), LinearScheme::Plain);
        assert_eq!(schemes.count().values().sum::<usize>(), 3);
    }

    #[test]
    fn idle_and_accidental_patterns_are_named() {
        let patterns = ["gate", GATE, "lm_head", "model.layers.9.mlp.up_proj", "*down*"];
        let found = ignoring(MO, &patterns, &[GATE, "lm_head"]);
        assert_eq!(found.idle, ["model.layers.9.mlp.up_proj", "*down*"]);
        assert_eq!(found.accidental, [("gate".to_string(), GATE.to_string())]);
    }

    #[test]
    fn an_expression_that_cannot_be_used_is_a_fault_and_the_others_count() {
        let huge = format!("re:{}", r"(?:\w{400}){400}".repeat(4));
        let found = ignoring(CT, &["re:(", &huge, "re:.*gate_proj", "re:(?!x)y"], &[GATE, "a"]);
        assert_eq!(found.faults.len(), 3, "{:?}", found.faults);
        assert!(found.faults[1].contains("too large") && found.faults[1].len() < 200, "{}", found.faults[1]);
        assert!(found.faults[2].contains("look-around"), "{}", found.faults[2]);
        assert_eq!(found.of_module(GATE), LinearScheme::Plain);
        assert_eq!(found.of_module("a"), LinearScheme::Nvfp4 { activations: true });
        let many: Vec<String> = (0..300).map(|i| format!(r"re:(?:\w{{80}}){{5}}{i}")).collect();
        let found = ignoring(CT, &many.iter().map(String::as_str).collect::<Vec<_>>(), &[GATE]);
        assert!(found.faults[0].contains("together"), "{:?}", found.faults);
        let many: Vec<&str> = vec!["*a*"; MOST_PATTERNS + 1];
        assert_eq!(ignoring(MO, &many, &[GATE]).faults.len(), 1);
    }

    #[test]
    fn lists_of_every_expert_and_heavy_expressions_end_soon() {
        let modules: Vec<String> = (0..25_000)
            .flat_map(|i| ["gate", "up", "down"].map(|n| format!("model.layers.3.mlp.experts.{i}.{n}_proj")))
            .collect();
        let modules: Vec<&str> = modules.iter().map(String::as_str).collect();
        let started = Instant::now();
        let mut patterns: Vec<&str> = modules.iter().step_by(3).copied().collect();
        patterns.push(r"re:(?:\w{100}){20}x");
        for layout in [CT, MO] {
            let found = ignoring(layout, &patterns, &modules);
            assert_eq!(found.count().values().sum::<usize>(), 50_000, "{layout}");
        }
        // A compilation, or a search, for each pair would take minutes.
        assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
    }
}
