//! What is said for `Authorization` at each stop, and the tokens that this takes.

use std::sync::PoisonError;

use reqwest::header::{AUTHORIZATION, CONTENT_TYPE, HeaderValue, WWW_AUTHENTICATE};
use reqwest::{Response, StatusCode};

use super::{Asker, Hop, Led, MAX_REDIRECTS, MAX_REPLY, Wanted};
use crate::images::error::ImageError;
use crate::images::registry::auth::{
    BadRealm, Challenge, Identity, TokenKey, TokenRequest, authority, read_token, token_request,
};
use crate::images::registry::transport::Role;

/// Stops of one pull whose challenges are remembered.
const MAX_CHALLENGES: usize = 64;

/// What shows the realm who we are.
enum Proof {
    Basic(String),
    Form(String),
}

impl Asker<'_> {
    /// Who we are to a stop.
    fn identity(&self, hop: &Hop) -> &Identity {
        match hop.home {
            true => &self.identity,
            false => &self.nobody,
        }
    }

    /// Keeps the challenge of a 401; false: there is nothing new to answer. `known`: we said already
    /// who we are.
    pub(super) fn note_challenge(&self, hop: &Hop, response: &Response, known: bool) -> bool {
        let headers = response.headers().get_all(WWW_AUTHENTICATE);
        let challenge = Challenge::parse(headers.iter().filter_map(|value| value.to_str().ok()));
        let identity = self.identity(hop);
        let useful = match &challenge {
            _ if hop.fallen => false,
            None => false,
            Some(Challenge::Basic) => !known && identity.basic().is_some(),
            Some(Challenge::Bearer { .. }) => identity.unasked().is_none(),
        };
        let challenges = self.challenges.lock();
        let mut challenges = challenges.unwrap_or_else(PoisonError::into_inner);
        if challenges.len() >= MAX_CHALLENGES {
            challenges.clear();
        }
        match challenge.filter(|_| useful) {
            Some(challenge) => challenges.insert(hop.stop(), challenge),
            None => challenges.remove(&hop.stop()),
        };
        useful
    }

    /// For `Authorization`. `refused`: what was sent before did not do.
    pub(super) async fn authorization(
        &self,
        hop: &Hop,
        refused: bool,
    ) -> Result<Option<HeaderValue>, ImageError> {
        let identity = self.identity(hop);
        if let Some(given) = identity.unasked() {
            return Ok(secret(&given));
        }
        let challenge = {
            let challenges = self.challenges.lock();
            let challenges = challenges.unwrap_or_else(PoisonError::into_inner);
            challenges.get(&hop.stop()).filter(|_| !hop.fallen).cloned()
        };
        match challenge {
            None => Ok(None),
            Some(Challenge::Basic) => Ok(identity.basic().and_then(|basic| secret(&basic))),
            Some(Challenge::Bearer {
                realm,
                service,
                scope,
            }) => {
                let scope = match scope.is_empty() {
                    true => format!("repository:{}:pull", self.repository_at(hop)),
                    false => scope,
                };
                let about = (&*service, &*scope);
                let key = TokenKey::new(&hop.url, &realm, about, identity);
                if refused {
                    self.tokens.drop(&key);
                }
                if let Some(token) = self.tokens.get(&key) {
                    return Ok(secret(&format!("Bearer {token}")));
                }
                let token = self.fetch_token(hop, &realm, about, key).await?;
                Ok(secret(&format!("Bearer {token}")))
            }
        }
    }

    /// What a stop calls the repository: its URL tells, where it is one of the distribution API.
    fn repository_at<'a>(&'a self, hop: &'a Hop) -> &'a str {
        let path = hop.url.path();
        let below = path.split_once("/v2/").map(|(_, below)| below);
        let name = below.and_then(|below| {
            let ends = ["/manifests/", "/blobs/"];
            ends.iter().find_map(|end| Some(below.rsplit_once(end)?.0))
        });
        match name {
            Some(name) if !hop.home && !name.is_empty() => name,
            _ => &self.repository,
        }
    }

    async fn fetch_token(
        &self,
        hop: &Hop,
        realm: &str,
        about: (&str, &str),
        key: TokenKey,
    ) -> Result<String, ImageError> {
        let asked = token_request(realm, about, self.identity(hop), &hop.url);
        let asked = asked.map_err(|error| match error {
            BadRealm::Url => self.broken_at(&hop.url, error.to_string()),
            BadRealm::Falls { .. } | BadRealm::Leaves { .. } => {
                let by = authority(&hop.url);
                self.astray(&Led { by, verb: "" }, error)
            }
        })?;
        let response = self.ask_realm(hop, asked).await?;
        if !response.status().is_success() {
            let note = self.withheld_from(hop);
            return Err(self.refused(response, note).await);
        }
        let place = response.url().clone();
        let body = self.body(response, MAX_REPLY, "token").await?;
        let (token, life) = read_token(&body)
            .ok_or_else(|| self.broken_at(&place, "the realm's reply holds no token"))?;
        self.tokens.put(key, token.clone(), life);
        Ok(token)
    }

    /// The realm's answer. Where it redirects to another place, that is asked too, and told nothing.
    async fn ask_realm(&self, hop: &Hop, asked: TokenRequest) -> Result<Response, ImageError> {
        let (mut url, mut proof) = match asked {
            TokenRequest::Get(url, basic) => (url, basic.map(Proof::Basic)),
            TokenRequest::Post(url, form) => (url, Some(Proof::Form(form))),
        };
        let mut role = match hop.home {
            true => Role::Client,
            false => Role::Stranger,
        };
        let mut led = Led {
            by: authority(&hop.url),
            verb: "names the realm",
        };
        for _ in 0..=MAX_REDIRECTS {
            let client = self.reach(&url, role, &led)?;
            let request = match &proof {
                None => client.get(url.clone()),
                Some(Proof::Basic(basic)) => match secret(basic) {
                    Some(basic) => client.get(url.clone()).header(AUTHORIZATION, basic),
                    None => client.get(url.clone()),
                },
                Some(Proof::Form(form)) => client
                    .post(url.clone())
                    .header(CONTENT_TYPE, "application/x-www-form-urlencoded")
                    .body(form.clone()),
            };
            let response = self.send(request, &url, &led).await?;
            if !response.status().is_redirection() {
                return Ok(response);
            }
            let (next, by) = self.target(&url, &response, Wanted::Token)?;
            if next.origin() != url.origin() {
                (proof, role) = (None, Role::Stranger);
            }
            if response.status() == StatusCode::SEE_OTHER {
                proof = proof.filter(|proof| !matches!(proof, Proof::Form(_)));
            }
            (url, led) = (next, by);
        }
        Err(self.broken_at(&url, "the realm redirects without end"))
    }
}

fn secret(text: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(text).ok()?;
    value.set_sensitive(true);
    Some(value)
}
