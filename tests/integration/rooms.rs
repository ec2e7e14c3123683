//! The rooms of src/ are those of ARCHITECTURE.md's table, imports go down in it, and the files that it names exist.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Rust files that a directory may hold at most.
const MOST_FILES: usize = 10;

/// Rooms of one directory each, whose files import each other without a circle.
const WITHOUT_CIRCLES: [&str; 8] =
    ["record", "progress", "job", "schedule", "states", "finish", "walk", "report"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// All Rust files below `dir`.
fn sources(dir: &Path) -> Vec<PathBuf> {
    let mut files = vec![];
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files
}

/// The rooms in the order of ARCHITECTURE.md's table, the highest first: each name in the first column that begins
/// with `src/`, without that and without `.rs` or `/`.
fn rooms() -> Vec<String> {
    let text = fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    let rows =
        text.lines().skip_while(|line| !line.starts_with("| room |")).take_while(|l| l.starts_with('|'));
    let names = rows.flat_map(|row| {
        let first = row.split('|').nth(1).unwrap();
        first.split('`').filter_map(|name| name.strip_prefix("src/")).collect::<Vec<_>>()
    });
    names.map(|name| name.trim_end_matches('/').trim_end_matches(".rs").to_string()).collect()
}

/// The room that a file belongs to.
fn room_of(file: &Path) -> String {
    let inside = file.strip_prefix(root().join("src")).unwrap();
    let first = inside.components().next().unwrap().as_os_str().to_str().unwrap();
    first.trim_end_matches(".rs").to_string()
}

/// A file without its comments.
fn code(file: &Path) -> String {
    let text = fs::read_to_string(file).unwrap();
    text.lines().map(|line| line.split("//").next().unwrap()).collect::<Vec<_>>().join("\n")
}

/// The first names behind each `prefix::`: one, or those in braces.
fn names_behind(code: &str, prefix: &str) -> BTreeSet<String> {
    let word = |text: &str| -> String {
        text.trim().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
    };
    let mut names = BTreeSet::new();
    for (at, found) in code.match_indices(&format!("{prefix}::")) {
        if code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == ':') {
            continue;
        }
        let rest = &code[at + found.len()..];
        let Some(list) = rest.strip_prefix('{') else {
            names.insert(word(rest));
            continue;
        };
        let (mut depth, mut item) = (1, String::new());
        for c in list.chars() {
            depth += (c == '{') as usize;
            depth -= (c == '}') as usize;
            if depth == 0 || (depth == 1 && c == ',') {
                names.insert(word(&item));
                item.clear();
            } else {
                item.push(c);
            }
            if depth == 0 {
                break;
            }
        }
    }
    names.retain(|name| !name.is_empty());
    names
}

#[test]
fn the_names_behind_a_prefix_are_found() {
    let code = "use crate::error::Result;\nuse crate::{confined, last_words::{a, b}, threads};\nx(crate::nvfp4::amax)";
    let names = names_behind(code, "crate");
    assert_eq!(
        names.into_iter().collect::<Vec<_>>(),
        ["confined", "error", "last_words", "nvfp4", "threads"]
    );
    assert_eq!(names_behind("use supercrate::a; x::crate::b", "crate"), BTreeSet::new());
}

#[test]
fn imports_go_down_in_the_table_of_rooms() {
    let rooms = rooms();
    let place = |room: &str| rooms.iter().position(|other| other == room);
    let mut wrong = vec![];
    for file in sources(&root().join("src")) {
        let room = room_of(&file);
        if room == "lib" {
            continue;
        }
        let Some(own) = place(&room) else {
            wrong.push(format!("{} is in no room of ARCHITECTURE.md", file.display()));
            continue;
        };
        let code = code(&file);
        for other in names_behind(&code, "crate").into_iter().chain(names_behind(&code, "distq")) {
            match place(&other) {
                Some(place) if place < own => wrong.push(format!("{} imports {other}", file.display())),
                Some(_) => {}
                None => wrong.push(format!("{} imports {other}, which is no room", file.display())),
            }
        }
    }
    assert!(wrong.is_empty(), "imports that go up in the table of rooms:\n{}", wrong.join("\n"));
    for room in &rooms {
        let path = root().join("src").join(room);
        assert!(path.is_dir() || path.with_extension("rs").is_file(), "ARCHITECTURE.md names src/{room}");
    }
}

#[test]
fn a_directory_holds_few_files() {
    let mut count: BTreeMap<PathBuf, usize> = BTreeMap::new();
    for file in sources(&root().join("src")) {
        *count.entry(file.parent().unwrap().to_path_buf()).or_default() += 1;
    }
    count.remove(&root().join("src"));
    count.retain(|_, files| *files > MOST_FILES);
    assert!(count.is_empty(), "directories with more than {MOST_FILES} files: {count:?}");
}

/// What the files of a room import of each other. What they take from `super` itself is an import of mod.rs, which
/// imports all of them.
fn imports_inside(room: &str) -> BTreeMap<String, BTreeSet<String>> {
    let dir = root().join("src").join(room);
    let name = |file: &PathBuf| file.file_stem().unwrap().to_str().unwrap().to_string();
    let files: BTreeMap<String, PathBuf> =
        sources(&dir).into_iter().map(|file| (name(&file), file)).collect();
    let others = || files.keys().filter(|name| *name != "mod").cloned();
    let imports = |(name, file): (&String, &PathBuf)| {
        if name == "mod" {
            return (name.clone(), others().collect());
        }
        let code = code(file);
        let code = code.split("#[cfg(test)]\nmod tests").next().unwrap();
        let from = names_behind(code, "super").into_iter();
        (
            name.clone(),
            from.map(|other| if files.contains_key(&other) { other } else { "mod".into() }).collect(),
        )
    };
    files.iter().map(imports).collect()
}

#[test]
fn files_of_a_room_import_each_other_without_a_circle() {
    for room in WITHOUT_CIRCLES {
        let mut imports = imports_inside(room);
        // Files that import nothing of what is left are in no circle.
        loop {
            let free: Vec<String> = imports
                .iter()
                .filter(|(_, others)| others.is_empty())
                .map(|(name, _)| name.clone())
                .collect();
            if free.is_empty() {
                break;
            }
            imports.retain(|name, _| !free.contains(name));
            imports.values_mut().for_each(|others| others.retain(|name| !free.contains(name)));
        }
        assert!(imports.is_empty(), "files of src/{room} import each other in a circle: {imports:?}");
    }
}

#[test]
fn files_that_the_architecture_names_exist() {
    let text = fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    let is_path = |name: &&str| {
        let plain = |c: char| c.is_ascii_alphanumeric() || "_/.".contains(c);
        name.ends_with(".rs") && name.chars().all(plain)
    };
    let exists = |name: &&str| ["", "src", "tests"].iter().any(|dir| root().join(dir).join(name).is_file());
    let missing: Vec<&str> = text.split('`').filter(is_path).filter(|name| !exists(name)).collect();
    assert!(missing.is_empty(), "ARCHITECTURE.md names files that do not exist: {missing:?}");
}
