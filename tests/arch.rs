//! The layering of `src/`, checked. A new top-level module must be ranked here and named in
//! `src/ARCHITECTURE.md`; a module may use only modules of lower rank.
#![expect(clippy::unwrap_used, reason = "a failed test may panic")]
use proc_macro2::{Delimiter, TokenStream, TokenTree};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use syn::spanned::Spanned;
use syn::visit::{self, Visit};

/// (module, rank). Equal rank: siblings, which may not use each other.
const RANKS: &[(&str, u8)] = &[
    ("base", 0),
    ("sys", 1),
    ("store", 2),
    ("runtime", 3),
    ("images", 3),
    ("network", 3),
    ("streaming", 3),
    ("nri", 3),
    ("monitor", 4),
    ("engine", 5),
    ("cri", 6),
    ("daemon", 7),
    ("cli", 7),
];
/// (crate path, modules that may name it).
const CONFINED: &[(&str, &[&str])] = &[
    ("tonic", &["cri", "daemon", "cli"]),
    ("prost", &["cri", "nri", "cli"]),
    (
        "tokio",
        &[
            "base",
            "store",
            "images",
            "network",
            "streaming",
            "nri",
            "engine",
            "cri",
            "daemon",
            "cli",
        ],
    ),
    ("libc", &["sys"]),
];
const MAX_LINES: usize = 600;

fn rank(m: &str) -> Option<u8> {
    RANKS.iter().find(|(n, _)| *n == m).map(|(_, r)| *r)
}

struct Source {
    path: PathBuf,
    module: String,
    text: String,
    test_lines: Vec<(usize, usize)>,
}

impl Source {
    fn is_test(&self) -> bool {
        self.in_test(0)
    }
    fn in_test(&self, line: usize) -> bool {
        self.test_lines
            .iter()
            .any(|(a, b)| (*a..=*b).contains(&line))
    }
}

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let (mut out, mut dirs) = (vec![], vec![root.clone()]);
    while let Some(dir) = dirs.pop() {
        for e in fs::read_dir(dir).unwrap() {
            let path = e.unwrap().path();
            if path.is_dir() {
                dirs.push(path);
            } else if path.extension().is_some_and(|x| x == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                let first = path.strip_prefix(&root).unwrap().iter().next().unwrap();
                let module = first.to_string_lossy().trim_end_matches(".rs").to_owned();
                let mut t = TestSpans(vec![]);
                t.visit_file(&syn::parse_file(&text).unwrap());
                // `#[cfg(test)] mod tests;` brings a whole file in.
                if path.file_name().is_some_and(|name| name == "tests.rs") {
                    t.0.push((1, usize::MAX));
                }
                out.push(Source {
                    path,
                    module,
                    text,
                    test_lines: t.0,
                });
            }
        }
    }
    let of_tests: Vec<PathBuf> = out.iter().flat_map(test_modules).collect();
    for s in &mut out {
        let stem = s.path.with_extension("");
        if of_tests.iter().any(|t| stem.starts_with(t)) {
            s.test_lines.push((0, usize::MAX));
        }
    }
    out
}

/// Where the files of `#[cfg(test)] mod name;` are, without their endings.
fn test_modules(s: &Source) -> Vec<PathBuf> {
    let stem = s.path.with_extension("");
    let below = match stem.file_name().and_then(|n| n.to_str()) {
        Some("mod" | "lib" | "main") => stem.parent().unwrap().to_owned(),
        _ => stem,
    };
    let file = syn::parse_file(&s.text).unwrap();
    file.items
        .iter()
        .filter_map(|item| match item {
            syn::Item::Mod(m) if m.content.is_none() && is_cfg_test(m) => {
                Some(below.join(m.ident.to_string()))
            }
            _ => None,
        })
        .collect()
}

fn is_cfg_test(m: &syn::ItemMod) -> bool {
    m.attrs.iter().any(|a| {
        a.path().is_ident("cfg")
            && matches!(&a.meta, syn::Meta::List(l) if l.tokens.to_string() == "test")
    })
}

struct TestSpans(Vec<(usize, usize)>);
impl<'a> Visit<'a> for TestSpans {
    fn visit_item_mod(&mut self, i: &'a syn::ItemMod) {
        if is_cfg_test(i) {
            self.0.push((i.span().start().line, i.span().end().line));
        } else {
            visit::visit_item_mod(self, i);
        }
    }
}

/// Every path in the tokens: its segments (a `{a, b}` group expanded one level) and its line.
fn paths(ts: TokenStream, out: &mut Vec<(Vec<String>, usize)>) {
    let v: Vec<TokenTree> = ts.into_iter().collect();
    for i in 0..v.len() {
        match &v[i] {
            TokenTree::Ident(_) if !(i > 0 && is_colon(&v[i - 1])) => follow(&v, i, &[], out),
            TokenTree::Group(g) => paths(g.stream(), out),
            _ => {}
        }
    }
}
fn is_colon(t: &TokenTree) -> bool {
    matches!(t, TokenTree::Punct(p) if p.as_char() == ':')
}
fn follow(v: &[TokenTree], mut i: usize, prefix: &[String], out: &mut Vec<(Vec<String>, usize)>) {
    let line = v[i].span().start().line;
    let mut p = prefix.to_vec();
    loop {
        match v.get(i) {
            Some(TokenTree::Ident(id)) => p.push(id.to_string()),
            Some(TokenTree::Group(g)) if g.delimiter() == Delimiter::Brace && !p.is_empty() => {
                let w: Vec<TokenTree> = g.stream().into_iter().collect();
                let mut fresh = true;
                for j in 0..w.len() {
                    if fresh && matches!(w[j], TokenTree::Ident(_)) {
                        follow(&w, j, &p, out);
                    }
                    fresh = matches!(&w[j], TokenTree::Punct(q) if q.as_char() == ',');
                }
                return;
            }
            _ => break,
        }
        if v.get(i + 1).is_some_and(is_colon) && v.get(i + 2).is_some_and(is_colon) {
            i += 3;
        } else {
            break;
        }
    }
    out.push((p, line));
}

#[test]
fn modules_use_only_lower_ranks() {
    let mut bad = vec![];
    for s in sources() {
        if matches!(s.module.as_str(), "lib" | "main" | "bin") {
            continue;
        }
        let Some(mine) = rank(&s.module) else {
            bad.push(format!(
                "{}: module `{}` has no rank",
                s.path.display(),
                s.module
            ));
            continue;
        };
        let mut ps = vec![];
        paths(s.text.parse().unwrap(), &mut ps);
        for (p, line) in ps {
            let at = format!("{}:{line}", s.path.display());
            if p.len() > 1 && p[0] == "super" && p[1] == "super" {
                bad.push(format!("{at}: write `crate::…`, not `super::super`"));
            }
            if p.len() > 1 && p[0] == "crate" && p[1] != s.module && !s.in_test(line) {
                match rank(&p[1]) {
                    Some(r) if r < mine => {}
                    Some(r) => bad.push(format!("{at}: {}({mine}) uses {}({r})", s.module, p[1])),
                    None => bad.push(format!("{at}: `crate::{}` is not a ranked module", p[1])),
                }
            }
            if let Some((name, who)) = CONFINED.iter().find(|(n, _)| p.len() > 1 && p[0] == *n)
                && !s.in_test(line)
                && !who.contains(&s.module.as_str())
            {
                bad.push(format!("{at}: `{name}` may not be named in `{}`", s.module));
            }
        }
    }
    assert!(bad.is_empty(), "\n{}\n", bad.join("\n"));
}

#[test]
fn unsafe_code_is_in_sys() {
    let bad: Vec<_> = sources()
        .into_iter()
        .filter(|s| s.module != "sys" && s.text.contains("unsafe_code"))
        .map(|s| s.path)
        .collect();
    assert!(
        bad.is_empty(),
        "these files opt out of the unsafe_code lint: {bad:?}"
    );
}

#[test]
fn files_have_a_purpose_and_a_size() {
    let mut bad = vec![];
    for s in sources() {
        let head = s.text.lines().next().unwrap_or_default();
        if !(head.starts_with("//!") || head.starts_with("#![doc")) {
            bad.push(format!(
                "{}: no `//!` line saying what it is for",
                s.path.display()
            ));
        }
        let n = (1..=s.text.lines().count())
            .filter(|l| !s.in_test(*l))
            .count();
        if n > MAX_LINES {
            bad.push(format!(
                "{}: {n} lines outside tests, at most {MAX_LINES}",
                s.path.display()
            ));
        }
    }
    assert!(bad.is_empty(), "\n{}\n", bad.join("\n"));
}

/// Items other modules can see say what they do, and how they fail.
struct Docs<'s> {
    at: &'s Path,
    bad: Vec<String>,
}
impl Docs<'_> {
    fn check(
        &mut self,
        vis: &syn::Visibility,
        attrs: &[syn::Attribute],
        what: &syn::Ident,
        sig: Option<&syn::Signature>,
    ) {
        let text: String = attrs
            .iter()
            .filter(|a| a.path().is_ident("doc"))
            .filter_map(|a| match &a.meta {
                syn::Meta::NameValue(nv) => match &nv.value {
                    syn::Expr::Lit(syn::ExprLit {
                        lit: syn::Lit::Str(s),
                        ..
                    }) => Some(s.value()),
                    _ => None,
                },
                _ => None,
            })
            .collect::<Vec<_>>()
            .join("\n");
        let at = format!(
            "{}:{}: `{what}`",
            self.at.display(),
            what.span().start().line
        );
        if sig.is_some_and(|s| s.unsafety.is_some()) && !text.contains("# Safety") {
            self.bad
                .push(format!("{at} is unsafe and has no `# Safety`"));
        }
        let seen = match vis {
            syn::Visibility::Public(_) => true,
            syn::Visibility::Restricted(r) => r.path.is_ident("crate"),
            syn::Visibility::Inherited => false,
        };
        if !seen {
            return;
        }
        if text.trim().is_empty() {
            self.bad.push(format!("{at} has no documentation"));
        }
        let fails = sig.is_some_and(|s| match &s.output {
            syn::ReturnType::Type(_, t) => matches!(&**t, syn::Type::Path(p)
                if p.path.segments.last().is_some_and(|x| x.ident.to_string().ends_with("Result"))),
            syn::ReturnType::Default => false,
        });
        if fails && !text.contains("# Errors") {
            self.bad
                .push(format!("{at} returns a Result and has no `# Errors`"));
        }
    }
}
impl<'a> Visit<'a> for Docs<'_> {
    fn visit_item_mod(&mut self, i: &'a syn::ItemMod) {
        if !i.attrs.iter().any(|a| a.path().is_ident("cfg")) {
            visit::visit_item_mod(self, i);
        }
    }
    fn visit_item_fn(&mut self, i: &'a syn::ItemFn) {
        self.check(&i.vis, &i.attrs, &i.sig.ident, Some(&i.sig));
    }
    fn visit_impl_item_fn(&mut self, i: &'a syn::ImplItemFn) {
        self.check(&i.vis, &i.attrs, &i.sig.ident, Some(&i.sig));
    }
    fn visit_item_struct(&mut self, i: &'a syn::ItemStruct) {
        self.check(&i.vis, &i.attrs, &i.ident, None);
    }
    fn visit_item_enum(&mut self, i: &'a syn::ItemEnum) {
        self.check(&i.vis, &i.attrs, &i.ident, None);
    }
    fn visit_item_trait(&mut self, i: &'a syn::ItemTrait) {
        self.check(&i.vis, &i.attrs, &i.ident, None);
    }
    fn visit_item_const(&mut self, i: &'a syn::ItemConst) {
        self.check(&i.vis, &i.attrs, &i.ident, None);
    }
}

#[test]
fn shared_items_are_documented() {
    let mut bad = vec![];
    for s in sources().into_iter().filter(|s| !s.is_test()) {
        let mut d = Docs {
            at: &s.path,
            bad: vec![],
        };
        d.visit_file(&syn::parse_file(&s.text).unwrap());
        bad.append(&mut d.bad);
    }
    assert!(bad.is_empty(), "\n{}\n", bad.join("\n"));
}

#[test]
fn the_code_map_is_current() {
    let text = include_str!("../src/ARCHITECTURE.md");
    let missing: BTreeSet<_> = RANKS
        .iter()
        .map(|(m, _)| *m)
        .filter(|m| !text.contains(&format!("`{m}`")))
        .collect();
    assert!(
        missing.is_empty(),
        "src/ARCHITECTURE.md does not name {missing:?}"
    );
}
